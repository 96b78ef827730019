"""What several processes with copies of a model do for `test_replicas.py`; run by `in_processes`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher_pl.callbacks import AtomicCheckpointIO
from patcher_pl.defenses import Defense
from patcher_pl.defenses.replicated_strategy import ReplicatedStrategy
from patcher_pl.models import Sharding
from tests.distributed import patcher_options_worker, runs
from tests.distributed.booster_worker import make_booster
from tests.distributed.patcher_options_worker import Seeded
from tests.distributed.vaccine_worker import make_vaccine
from tests.distributed.worker import assert_same_parts, whole
from tests.estimator_table import HIGHER_ORDER
from tests.tiny_runs import make_llama_exact, snapshot

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OPTIONS = ("attacks", "adapters", "lora", "kl", "states")
OTHERS = ("vaccine", "booster")  # What they divide by is a norm over the rows of all processes.


def make(folder: Path, kind: str) -> Defense:
    """A defense as others train it sharded, or with a hypergradient that is taken anew at every step."""
    options: dict[str, Any] = {}
    if SIZE == 4:  # Two copies, of two processes each.
        options["language_model"] = {"sharding": Sharding(num_replicas=2)}
    if kind == "vaccine":
        return make_vaccine(folder, **options.get("language_model", {}))
    if kind == "booster":
        return make_booster(folder, **options.get("language_model", {}))
    if kind in OPTIONS:
        return patcher_options_worker.make(folder, kind, **options)
    if kind == "plain":
        return runs.make_patcher(folder / "llama", **options)
    options["accumulate_grad_batches"] = 2
    return runs.make_hypergradient_patcher(folder / "llama", HIGHER_ORDER[kind], **options)


def kinds(size: int) -> tuple[str, ...]:
    """What so many processes train: exact hypergradients need whole copies."""
    return ("plain", *OPTIONS, *OTHERS, *(HIGHER_ORDER if size == 2 else ()))


def train(defense: Defense, folder: Path, num_steps: int, **options: Any) -> None:
    """As `runs.train` does; with two processes, each has the whole model."""
    if SIZE == 2:
        options |= {"strategy": ReplicatedStrategy(), "plugins": [AtomicCheckpointIO()]}
    runs.train(defense, folder, SIZE, num_steps, **options)


def weights_of(model: Any) -> Any:
    """All weights on the first process, None on others."""
    return snapshot(model) if SIZE == 2 else whole(model)


def num_steps(kind: str) -> int:
    return 2 if kind in HIGHER_ORDER else runs.NUM_STEPS


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for kind in kinds(SIZE):
            directory, logger = folder / f"{SIZE}-{kind}", runs.memory()
            defense = make(folder, kind)
            callbacks = [runs.saving(directory), Seeded()]
            train(defense, folder, num_steps(kind), logger=logger, callbacks=callbacks)
            weights = weights_of(defense.model)
            if RANK == 0:
                torch.save((weights, logger.history), folder / f"{SIZE}-{kind}.pt")
            if kind in OPTIONS:
                resumed = make(folder, kind)
                saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
                train(resumed, folder, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
                assert_same_parts(resumed, defense)
            print(kind, flush=True)
        # One process wrote the one, two with copies the other.
        for name in ("by-one", *(("2-plain",) if SIZE == 4 else ())):
            defense = make(folder, "plain")
            saved = folder / name / f"step-{runs.SAVED_AT:08d}.ckpt"
            train(defense, folder, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
            weights = weights_of(defense.model)
            if RANK == 0:
                torch.save(weights, folder / f"{SIZE}-from-{name}.pt")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
