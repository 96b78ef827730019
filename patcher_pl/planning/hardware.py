"""GPUs by name: memory and dense peak rates, from their makers' data sheets."""

from dataclasses import dataclass

from patcher_pl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a plan needs to know of a GPU."""

    name: str  # As given on the command line.
    memory_gib: float  # That the driver reports (GiB; makers' "80 GB" are 79.6 of an H100).
    bfloat16_tflops: float  # Dense peak of matrix products, without sparsity (TFLOP/s).
    float32_tflops: float  # The same without TF32, torch's default (TFLOP/s).

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return round(self.memory_gib * 2**30)

    def peak_flops(self, dtype: str) -> float:
        """Peak rate of matrix products in a number format (FLOP/s)."""
        return (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops) * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="L4", memory_gib=22.5, bfloat16_tflops=121, float32_tflops=30.3),
        Gpu(name="RTX-4090", memory_gib=24.0, bfloat16_tflops=165, float32_tflops=82.6),
        Gpu(name="A100-40GB", memory_gib=39.4, bfloat16_tflops=312, float32_tflops=19.5),
        Gpu(name="L40S", memory_gib=44.5, bfloat16_tflops=362, float32_tflops=91.6),
        Gpu(name="A100-80GB", memory_gib=79.2, bfloat16_tflops=312, float32_tflops=19.5),
        Gpu(name="H100-80GB", memory_gib=79.6, bfloat16_tflops=989, float32_tflops=67),
        Gpu(name="H200-141GB", memory_gib=139.8, bfloat16_tflops=989, float32_tflops=67),
        Gpu(name="B200-180GB", memory_gib=178.4, bfloat16_tflops=2250, float32_tflops=75),
        Gpu(name="MI300X-192GB", memory_gib=191.7, bfloat16_tflops=1307, float32_tflops=163.4),
    )
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU of the table, or refuses."""
    if name not in GPUS:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}.")
    return GPUS[name]
