"""What two processes do for `test_low_memory_sharded.py`; run by `in_processes`."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from patcher_pl.defenses import Patcher
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.optim.low_memory import StateDtype
from tests.distributed import runs
from tests.distributed.worker import assert_same_parts, whole

RANK = int(os.environ.get("RANK", 0))
STATE_DTYPES: tuple[StateDtype, ...] = ("bfloat16", "8bit")
# Of which the embeddings of the tiny model, and their halves, are whole blocks.
BLOCK = 32


def eight_bits(parameters: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-3, weight_decay=0.1, block_size=BLOCK)


def make_patcher(folder: Path, state_dtype: StateDtype | None) -> Patcher:
    optimizer = AdamW(lr=1e-3, state_dtype=state_dtype)
    return Patcher(
        LanguageModel(path=str(folder / "llama")),
        replace(runs.make_attacker(), optimizer=optimizer),
        optimizer=eight_bits,
        refresh_every=runs.REFRESH_EVERY,
        num_sft_steps=runs.NUM_SFT_STEPS,
    )


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    """Blocks that fit the tiny model; and torchao's steps as they are, or they would take minutes."""
    patch.setattr("patcher_pl.optim.low_memory._BLOCK", BLOCK)
    torch.compiler.set_stance("force_eager")


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        without_compiler(patch)
        for state_dtype in STATE_DTYPES:
            directory = folder / f"run-{state_dtype}"
            defense = make_patcher(folder, state_dtype)
            saving = [runs.saving(directory, in_background=state_dtype == "8bit")]
            runs.train(defense, folder, 2, runs.NUM_STEPS, callbacks=saving)
            kept = [s["exp_avg"] for s in defense.optimizers().state.values()]  # type: ignore[union-attr]
            assert all(isinstance(one, DTensor) for one in kept)
            kinds = {type(one.to_local()).__name__ for one in kept}
            assert kinds == {"Tensor", "OptimState8bit"}, "small tensors are left in float32"
            weights = whole(defense.model)
            if RANK == 0:
                torch.save(weights, folder / f"{state_dtype}.pt")
            resumed = make_patcher(folder, state_dtype)
            saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
            runs.train(resumed, folder, 2, runs.NUM_STEPS, ckpt_path=saved, weights_only=True)
            assert_same_parts(resumed, defense)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
