"""What two processes do for `test_vaccine_sharded.py`; run by `in_processes`."""

import os
import sys
from pathlib import Path

import pytest
import torch

from patcher_pl.defenses import Vaccine
from patcher_pl.models import LanguageModel
from tests.distributed import runs
from tests.distributed.fsdp1_worker import CPUStrategy
from tests.distributed.worker import whole
from tests.tiny_runs import make_llama_exact

NUM_STEPS = 4


def make_vaccine(folder: Path, **model) -> Vaccine:
    """With clipping, and accumulation: gradients are there while embeddings' are computed."""
    return Vaccine(
        LanguageModel(path=str(folder / "llama"), dtype="float64", **model),
        optimizer=runs.build_optimizer,
        rho=0.5,
        max_grad_norm=0.5,
        accumulate_grad_batches=2,
    )


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for name, model, options in (
            ("fsdp2", {}, {}),
            ("recomputed", {"gradient_checkpointing": True}, {}),
            ("fsdp1", {}, {"strategy": CPUStrategy()}),
        ):
            defense, logger = make_vaccine(folder, **model), runs.memory()
            runs.train(defense, folder, 2, NUM_STEPS, logger=logger, **options)
            weights = whole(defense.model)
            if int(os.environ["RANK"]) == 0:
                torch.save((weights, logger.history), folder / f"{name}.pt")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
