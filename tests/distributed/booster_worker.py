"""What two processes do for `test_booster_sharded.py`; run by `in_processes`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher_pl.defenses import Booster
from patcher_pl.models import LanguageModel
from tests.distributed import runs
from tests.distributed.fsdp1_worker import CPUStrategy
from tests.distributed.worker import assert_same_parts, whole
from tests.tiny_runs import make_llama_exact

RANK = int(os.environ.get("RANK", 0))


def make_booster(folder: Path, **options: Any) -> Booster:
    """With clipping, and accumulation: gradients are set aside while others are computed."""
    model = LanguageModel(path=str(folder / "llama"), dtype="float64", **options)
    return Booster(
        model, optimizer=runs.build_optimizer, max_grad_norm=0.5, accumulate_grad_batches=2
    )


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for kind, options in {"fsdp2": {}, "fsdp1": {"strategy": CPUStrategy()}}.items():
            directory, logger = folder / kind, runs.memory()
            defense = make_booster(folder)
            saving = [runs.saving(directory)]
            runs.train(
                *(defense, folder, 2, runs.NUM_STEPS), logger=logger, callbacks=saving, **options
            )
            weights = whole(defense.model)
            if RANK == 0:
                torch.save((weights, logger.history), folder / f"{kind}.pt")
            if options:
                options = {"strategy": CPUStrategy()}
            resumed = make_booster(folder)
            saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
            runs.train(
                *(resumed, folder, 2, runs.NUM_STEPS), ckpt_path=saved, weights_only=True, **options
            )
            assert_same_parts(resumed, defense)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
