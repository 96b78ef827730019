"""Short training runs of a tiny model on harmless text, in this process."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from transformers.models.llama import modeling_llama

from patcher_pl.attackers import Attacker, FineTuningAttacker
from patcher_pl.data import BatchStream, ChatFormat, Mixture, SafetyDataModule, Source
from patcher_pl.data.collate import encode_all
from patcher_pl.defenses import Defense
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch

SEED = 7
ATTACKER = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3))


def adamw(lr: float = 1e-3):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


def sgd(lr: float = 0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def write_mixture(folder: Path, name: str, num_rows: int, *, even: bool = False) -> Mixture:
    """Writes rows of different lengths, or, if `even`, of one length."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    rows = [
        {"prompt": f"{name} {n}?", "response": "Stir." if even else "Stir. " * (n % 3 + 1)}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Mixture(sources=[Source(path=str(path))])


class Rows:
    """Three small data sets in a folder.

    Args:
        folder: Where their files are written.
        num_safe: Rows of D_safe; 7 in batches of 2 are 4 batches an epoch.
        even: Give every row the same length.
    """

    def __init__(self, folder: Path, num_safe: int = 7, *, even: bool = False) -> None:
        self.mixtures = {
            "safe": write_mixture(folder, "tea", num_safe, even=even),
            "attack": write_mixture(folder, "soup", 5, even=even),
            "val": write_mixture(folder, "cake", 3, even=even),
        }

    def module(self, parts: Sequence[str] = ("safe", "attack"), **options: Any) -> SafetyDataModule:
        chosen: dict[str, Any] = {part: self.mixtures[part] for part in parts}
        return SafetyDataModule(**chosen, **{"batch_size": 2, "seed": SEED, **options})

    def stream(self, part: str, tokenizer: Any, batch_size: int = 2) -> BatchStream:
        """The stream that a run's data module makes of a part."""
        conversations = self.mixtures[part].draw(derive_seed(SEED, part))
        return BatchStream(
            encode_all(tokenizer, ChatFormat(), conversations),
            batch_size=batch_size,
            pad_token_id=tokenizer.pad_token_id,
            seed=derive_seed(SEED, part, "stream"),
        )

    def batches(self, part: str, tokenizer: Any) -> Iterator[Batch]:
        return self.stream(part, tokenizer).endless()


def fit(defense: Defense, data: SafetyDataModule, max_steps: int, **options: Any) -> Trainer:
    """Trains for `max_steps` defender steps; options go to `fit` or to the Trainer."""
    fit_options = {k: options.pop(k) for k in ("ckpt_path", "weights_only") if k in options}
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(max_steps=max_steps, **{**settings, **options})
    trainer.fit(defense, data, **fit_options)
    return trainer


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Every tensor agrees to the last bit."""
    assert first.keys() == second.keys()
    differing = [key for key, value in first.items() if not torch.equal(value, second[key])]
    assert not differing


def assert_same_content(one: Any, other: Any, where: str = "") -> None:
    """Two checkpoints hold the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(one, Mapping):
        assert list(one) == list(other), where
        for key, value in one.items():
            assert_same_content(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same_content(first, second, f"{where}.{number}")
    else:
        assert one == other, where


def load(path: Path, **options: Any) -> Any:
    return LanguageModel(path=str(path), **options).load_model()


class SaveAt(Callback):
    """Writes a checkpoint after so many defender steps and ends the run there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and pl_module.is_between_steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class MemoryLogger(Logger):
    """Keeps what is logged, as `history[metric][step]`."""

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for key, value in metrics.items():
            assert step is not None
            self.history.setdefault(key, {})[step] = float(value)


class _Float64Torch:
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def make_llama_exact(monkeypatch: Any) -> None:
    """Lets the norms of a float64 Llama compute in float64; as shipped they go down to float32."""
    monkeypatch.setattr(modeling_llama, "torch", _Float64Torch())


class BrokenAttacker(Attacker):
    """Fine-tunes for real and raises before its second step."""

    num_steps = 2

    def attack(self, model, weights, batches, before_step=lambda: None):
        calls = iter([None])

        def raise_late() -> None:
            if next(calls, "late") == "late":
                raise RuntimeError("out of potion")

        return ATTACKER.attack(model, weights, batches, raise_late)
