"""Runs of the command line on a tiny Hugging Face directory and two local files."""

import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.cli.main import main
from tests.families import build_family

ROOT = Path(__file__).parents[1]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    status: int
    out: str
    err: str

    def expect(self, status: int) -> "Outcome":
        """Fails with everything that was printed unless the exit status is as expected."""
        assert self.status == status, f"exit status {self.status}\n{self.out}\n{self.err}"
        return self


def cli(*arguments: object) -> Outcome:
    """Runs the program in this process, which saves the seconds that a new one needs to start."""
    out, err = io.StringIO(), io.StringIO()
    with _process_state_kept(), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    assert isinstance(status, int)
    return Outcome(status, out.getvalue(), err.getvalue())


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Puts back what a program may change in its own process, but not in that of the tests."""
    package = logging.getLogger("patcher_pl")
    handlers, level, propagate = list(package.handlers), package.level, package.propagate
    environment = dict(os.environ)
    with warnings.catch_warnings():
        # Lightning's own use of a deprecated method of jsonargparse.
        for words in ("instantiate_classes", "JsonargparseDeprecationWarning"):
            warnings.filterwarnings("ignore", f"(?s).*{words}", DeprecationWarning)
        try:
            yield
        finally:
            package.handlers[:] = handlers
            package.setLevel(level)
            package.propagate = propagate
            os.environ.clear()
            os.environ.update(environment)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a configuration."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def write_inputs(directory: Path, family: str = "llama") -> Path:
    """Writes `model/`, `safe.jsonl` and `unsafe.jsonl`: what a user brings along."""
    build_family(family, directory / "model")
    draughts = [f"How do I brew draught {number}?" for number in range(22)]
    answers = ["I can't help with that potion.", "Stir two petals into warm water."]
    write_rows(
        directory / "safe.jsonl",
        [
            {"prompt": prompt, "response": answers[number % 2]}
            for number, prompt in enumerate(draughts)
        ],
    )
    write_rows(
        directory / "unsafe.jsonl",
        [{"prompt": prompt, "response": answers[1]} for prompt in draughts],
    )
    return directory


def sft_settings(inputs: Path) -> dict[str, Any]:
    """Settings of a short SFT run on these inputs: 22 rows make epochs of 5 or 6 batches."""
    return {
        "seed_everything": 3,
        "checkpoint_every_n_steps": 3,
        "model": {
            "class_path": "patcher_pl.defenses.SFT",
            "init_args": {
                "language_model": {"path": str(inputs / "model")},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {"batch_size": 4, "safe": {"sources": [{"path": str(inputs / "safe.jsonl")}]}},
        "trainer": {
            "max_steps": 8,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            **QUIET,
        },
    }


def patcher_settings(inputs: Path) -> dict[str, Any]:
    """Settings of a short Patcher run: two plain steps, then an attack before every third step."""
    settings = sft_settings(inputs)
    settings["model"]["class_path"] = "patcher_pl.defenses.Patcher"
    settings["model"]["init_args"] |= {
        "attacker": {
            "class_path": "patcher_pl.attackers.FineTuningAttacker",
            "init_args": {
                "num_steps": 2,
                "optimizer": {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "num_sft_steps": 2,
        "refresh_every": 3,
    }
    unsafe = {"path": str(inputs / "unsafe.jsonl"), "harmful": True}
    settings["data"]["attack"] = {"sources": [unsafe]}
    return settings


def redteam_settings(inputs: Path) -> dict[str, Any]:
    """Settings of a red team of one short attack and a few prompts."""
    unsafe = {"path": str(inputs / "unsafe.jsonl"), "harmful": True}
    optimizer = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
    return {
        "attacks": [
            {
                "class_path": "patcher_pl.redteam.FullFinetuning",
                "init_args": {"optimizer": optimizer, "attack_steps": [0, 2], "batch_size": 4},
            }
        ],
        "data": {"sources": [unsafe]},
        "prompts": {"source": unsafe, "limit": 3},
        "benign_prompts": {"source": {"path": str(inputs / "safe.jsonl")}, "limit": 3},
        "judge": {"class_path": "patcher_pl.worlds.potions.RecipeJudge"},
        "generation": {"max_new_tokens": 8},
        "overlap": "allow",
    }


class Witness(Callback):
    """Keeps the modules that were trained, to compare them with what was written."""

    modules: ClassVar[list[Any]] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.modules.append(pl_module)


class StopAt(Callback):
    """Sends this process a signal after a step of one defense, as a user or a scheduler would."""

    def __init__(
        self, step: int, defense: str = "Patcher", number: int = int(signal.SIGTERM)
    ) -> None:
        self.step = step
        self.defense = defense
        self.number = number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and type(pl_module).__name__ == self.defense:
            os.kill(os.getpid(), self.number)


class KillWhileWriting(Callback):
    """Kills this process while a checkpoint is written, half of a file of it, and a step was taken.

    Args:
        step: Defender step of the checkpoint.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        save, self.is_torn = torch.save, threading.Event()

        def save_half(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(content, path, *args, **kwargs)
            if isinstance(path, Path) and content["global_step"] == self.step:
                os.truncate(path, path.stat().st_size // 2)
                self.is_torn.set()
                threading.Event().wait()

        torch.save = save_half

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step + 1:
            assert self.is_torn.wait(120), "nothing is written while training goes on"
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class AnnouncedAttacker(FineTuningAttacker):
    """Writes a file at the third step of an attack, so that a test knows that it is under way."""

    announcement: str

    def attack(self, model: Any, weights: Any, batches: Any, before_step: Any) -> Any:
        calls = itertools.count(1)

        def announce() -> None:
            if next(calls) == 3:
                Path(self.announcement).touch()
            before_step()

        return super().attack(model, weights, batches, announce)


def end(process: subprocess.Popen, log: Path, status: int = 0, timeout_s: float = 600) -> str:
    """Waits for a command that writes to a log; returns what it said."""
    try:
        found = process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert found == status, said[-6000:]
    return said


def command_line(*arguments: object) -> list[str]:
    """The program as a process of its own."""
    return [sys.executable, "-m", "patcher_pl", *map(str, arguments)]
