"""Complete runs on the testbed: what a GPU changes, sharding, offload, concurrency, resuming."""

import json
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check.processes import Clock, PartError, kill, run, start, tail

CONFIG = "configs/testbed/patcher.yaml"
MODEL = "models/smollm2-135m"
FSDP2 = {
    "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
    "trainer.strategy.init_args.data_parallel_size": "1",
    "trainer.strategy.init_args.tensor_parallel_size": "1",
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of `fit` below one folder.

    Args:
        folder: For run directories and logs.
        device: `gpu` or `cpu`, as Lightning's accelerators are named.
        clock: Ends all of them.
        max_steps: Defender steps of the shorter runs; None for those of the configuration.
        limit_s: Longest time that one run may take.
    """

    folder: Path
    device: str
    clock: Clock
    max_steps: int = 300
    limit_s: float = 240.0

    def fit(self, name: str, config: str = CONFIG, **options: str) -> dict[str, Any]:
        """Runs `fit`; returns seconds and what the run left behind."""
        run_dir = self.folder / name
        arguments = self._arguments(run_dir, config, options)
        seconds = run(arguments, self._log(name), self.clock.left(self.limit_s), _ONE_THREAD)
        return {"seconds": seconds, **_left_behind(run_dir)}

    def short(self, name: str, config: str = CONFIG, **options: str) -> dict[str, Any]:
        """The same without control and red team, for losses and weights."""
        return self.fit(name, config, **(self._short | options))

    @property
    def _short(self) -> dict[str, str]:
        return {
            "control": "false",
            "redteam": "null",
            "probe_every_n_steps": "null",
            "trainer.max_steps": str(self.max_steps),
        }

    def _arguments(self, run_dir: Path, config: str, options: Mapping[str, str]) -> list[str]:
        given = {"run_dir": str(run_dir), "trainer.accelerator": self.device, **options}
        flags = [f"--{key}={value}" for key, value in given.items()]
        return ["-m", "patcher_pl", "fit", "--config", config, *flags]

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def potions(self) -> dict[str, Any]:
        """The README's first command: losses of the first steps, curves at the end."""
        found = self.fit("potions")
        return {**_summary(found), "first_losses": found["losses"][:10]}

    def potions_on_cpu(self) -> dict[str, Any]:
        """The same on the CPU, for comparison."""
        found = self.fit("potions-cpu", **{"trainer.accelerator": "cpu"})
        return {**_summary(found), "first_losses": found["losses"][:10]}

    def repeated(self) -> dict[str, Any]:
        """Two equal runs, and one that is killed and resumed: which weights are the same bits."""
        first, second = self.short("once"), self.short("again")
        killed = self._killed_and_resumed("killed")
        return {
            "same_losses": first["losses"] == second["losses"],
            "largest_difference": _difference(first, second),
            "resumed_from_step": killed["resumed_from_step"],
            "largest_difference_after_resuming": _difference(first, killed),
        }

    def _killed_and_resumed(self, name: str) -> dict[str, Any]:
        run_dir, log = self.folder / name, self._log(name)
        arguments = self._arguments(run_dir, CONFIG, self._short)
        process = start(arguments, log, _ONE_THREAD)
        ends_at = time.monotonic() + self.clock.left(self.limit_s)
        while not (saved := sorted((run_dir / "checkpoints").glob("step*"))):
            if process.poll() is not None or time.monotonic() > ends_at:
                kill(process)
                raise PartError(f"no checkpoint was written: {tail(log)}")
            time.sleep(0.05)
        kill(process)
        found = self.fit(name, **(self._short | {"ckpt_path": "last"}))
        return {**found, "resumed_from_step": saved[-1].name}

    def sharded(self) -> dict[str, Any]:
        """FSDP2 in one process with the device's own collectives, in memory and offloaded."""
        plain = self.short("whole")
        found: dict[str, Any] = {}
        for name, options in (
            ("fsdp2", {}),
            ("fsdp2_cpu_offload", {"model.init_args.language_model.sharding.cpu_offload": "true"}),
        ):
            try:
                one = self.short(name.replace("_", "-"), **FSDP2, **options)
                found[name] = {
                    "seconds": one["seconds"],
                    "largest_difference": _difference(plain, one),
                }
            except PartError as error:
                found[name] = {"failed": str(error)}
        return found

    def fsdp1(self) -> dict[str, Any]:
        """FSDP1 in one process; it exists on GPUs only."""
        if self.device != "gpu":
            raise PartError("FSDP1 needs a GPU")
        strategy = {"trainer.strategy": "lightning.pytorch.strategies.FSDPStrategy"}
        return _summary(self.short("fsdp1", **strategy))

    def facts(self) -> dict[str, Any]:
        """SmolLM2's facts world: the paper's k1 with k2 scaled to minutes, and the SFT control."""
        if not Path(MODEL).exists():
            raise PartError(f"there is no {MODEL}; see tools/gpu_check/run.sh")
        toy = self.device != "gpu"
        options = {
            "model.init_args.attacker.init_args.num_steps": "2" if toy else "300",
            "model.init_args.refresh_every": "2" if toy else "200",
            "model.init_args.num_sft_steps": "2" if toy else "200",
            **(self._short if toy else {"trainer.precision": "bf16-mixed"}),
            "trainer.max_steps": "4" if toy else "800",
        }
        return _summary(self.fit("facts", "configs/smollm2-135m/patcher.yaml", **options))

    def concurrent(self) -> dict[str, Any]:
        """Attacker and defender on one device."""
        options = {} if self.max_steps == 300 else {"trainer.max_steps": str(self.max_steps)}
        return _summary(
            self.fit("concurrent", "configs/testbed/concurrent.yaml", control="false", **options)
        )


_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _left_behind(run_dir: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted(path.parent for path in run_dir.glob("tensorboard/**/events*"))
    defense = next((path for path in folders if "control" not in path.name), None)
    found: dict[str, Any] = {"model": str(run_dir / "model"), "losses": [], "curves": []}
    if defense is not None:
        events = EventAccumulator(str(defense), {"scalars": 0}).Reload()
        if "train/loss_safe" in events.Tags()["scalars"]:
            found["losses"] = [point.value for point in events.Scalars("train/loss_safe")]
    results = run_dir / "results.json"
    if results.exists():
        found["curves"] = json.loads(results.read_text(encoding="utf-8"))["curves"]
    return found


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seconds": found["seconds"],
        "last_loss": statistics.mean(found["losses"][-5:]) if found["losses"] else None,
        "curves": [
            {
                "defense": curve["defense"],
                "attack_steps": curve["attack_steps"],
                "asr": curve["asr"],
                "benign_at_release": curve["benign_accuracy"][0],
                "steps_to_break": curve["steps_to_break"],
            }
            for curve in found["curves"]
        ],
    }


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest difference of two exported models' weights, by the largest weight."""
    from safetensors.torch import load_file

    first, second = (load_file(Path(run["model"]) / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    distance = max(float((first[name] - second[name]).abs().max()) for name in first)
    return distance / max(float(value.abs().max()) for value in first.values())


def device_name() -> str | None:
    """What `nvidia-smi` calls the GPU; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
