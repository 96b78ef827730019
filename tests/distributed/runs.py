"""Runs that one process and two sharded ones must end alike, and the two processes themselves."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.callbacks import RunCheckpoint
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.hypergradients import Adjoint, Hypergradient, Truncated
from patcher_pl.hypergradients.hvp import FiniteDifference
from patcher_pl.models import LanguageModel
from patcher_pl.optim import SGD, AdamW
from tests.commands import ROOT
from tests.tiny_runs import MemoryLogger, Rows, fit

# A round of two plain steps, then three of two steps after an attack each.
NUM_STEPS, SAVED_AT, NUM_SFT_STEPS, REFRESH_EVERY = 8, 5, 2, 2
ADAMW = AdamW(lr=1e-3, eps=1e-6)
ESTIMATORS = {
    "adjoint": Adjoint(hvp=FiniteDifference()),
    "one_sided": Truncated(last_steps=2, adjoint=Adjoint(hvp=FiniteDifference(scheme="one_sided"))),
}


def build_optimizer(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    # Where gradients are round-off, the usual eps would turn that into a step.
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-6, weight_decay=0.1, **options)


def make_attacker() -> FineTuningAttacker:
    """Two steps with clipping."""
    return FineTuningAttacker(num_steps=2, optimizer=ADAMW, max_grad_norm=0.5)


def make_patcher(path: Path, **options: Any) -> Patcher:
    """Patcher with clipping (in defense and attack), accumulation and a schedule."""
    settings: dict[str, Any] = {
        "attacker": make_attacker(),
        "optimizer": build_optimizer,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "refresh_every": REFRESH_EVERY,
        "num_sft_steps": NUM_SFT_STEPS,
        "max_grad_norm": 0.5,
        "accumulate_grad_batches": 2,
    }
    model = LanguageModel(path=str(path), dtype="float64", **options.pop("language_model", {}))
    return Patcher(model, **{**settings, **options})


def make_hypergradient_patcher(path: Path, hypergradient: Hypergradient, **options: Any) -> Patcher:
    """Patcher with a fresh estimate at every step."""
    attacker = FineTuningAttacker(
        num_steps=3, optimizer=SGD(lr=0.3, momentum=0.5), max_grad_norm=0.2
    )
    return make_patcher(
        path,
        attacker=attacker,
        hypergradient=hypergradient,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        refresh_every=1,
        num_sft_steps=0,
        trust_every=1,
        **{"accumulate_grad_batches": 1, **options},
    )


def make_dropping_sft(path: Path) -> SFT:
    """SFT of a model with dropout: the random numbers of every process count."""
    return SFT(LanguageModel(path=str(path)), optimizer=build_optimizer)


def train(defense: Any, folder: Path, num_processes: int, num_steps: int, **options: Any) -> Any:
    """Trains on batches of 4 rows of different lengths, however many processes share them.

    Validates too: a forward pass without a backward pass leaves gathered weights behind.
    """
    saves = any(isinstance(callback, RunCheckpoint) for callback in options.get("callbacks", ()))
    several: dict[str, Any] = {"enable_checkpointing": saves}
    if num_processes > 1:
        strategy = ModelParallelStrategy(data_parallel_size=num_processes, tensor_parallel_size=1)
        several |= {"strategy": strategy, "use_distributed_sampler": False}
    size, packing = 4 // num_processes, options.pop("packing", False)
    data = Rows(folder / f"rows-{os.environ.get('RANK', 'alone')}").module(
        ("safe", "attack", "val"), batch_size=size, packing=packing
    )
    return fit(
        defense,
        data,
        num_steps,
        devices=num_processes,
        **{"num_sanity_val_steps": 1, "val_check_interval": 1, **several, **options},
    )


def read(path: Path) -> Any:
    """What a process has left there."""
    return torch.load(path, weights_only=True)


def assert_close(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    """The same tensors, by name."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance)


def saving(folder: Path, **options: Any) -> RunCheckpoint:
    return RunCheckpoint(folder, every_n_steps=SAVED_AT, **options)


def memory() -> MemoryLogger:
    return MemoryLogger()


def in_processes(
    worker: str, folder: Path, timeout_s: float = 1200, *, num_processes: int = 2
) -> None:
    """Runs a module of the tests in processes that know of each other, as torchrun would.

    Raises:
        AssertionError: With everything that they said, if one of them fails or is late.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "TORCHELASTIC_RUN_ID": "tests",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    logs = [folder / f"rank-{rank}.log" for rank in range(num_processes)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as output:
            command = [sys.executable, "-m", worker, str(folder)]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        statuses = [process.wait(timeout=timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0] * num_processes, "\n\n".join(log.read_text()[-6000:] for log in logs)
