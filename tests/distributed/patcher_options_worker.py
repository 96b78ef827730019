"""What two processes do for `test_patcher_options_sharded.py`; run by `in_two_processes`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from tests.distributed import runs
from tests.distributed.fsdp1_worker import CPUStrategy
from tests.distributed.worker import assert_same_parts, whole
from tests.tiny_runs import Rows, make_llama_exact

RANK = int(os.environ.get("RANK", 0))
KINDS = {"kl": KLToBase, "states": RepresentationDistance}


def make(folder: Path, kind: str, **options: Any) -> Patcher:
    """Two attack points, what is retained at theta and after the attack; clipping, accumulation."""
    benign = Rows(folder / f"benign-{os.environ.get('RANK', 'alone')}", num_safe=9)
    retain = KINDS[kind](data=benign.mixtures["safe"], weight=0.5, attacked_weight=0.25)
    attacker = FineTuningAttacker(
        num_steps=2, optimizer=runs.ADAMW, max_grad_norm=0.5, vector_steps=[1, 2]
    )
    return runs.make_patcher(folder / "llama", attacker=attacker, retain=retain, **options)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    strategies: dict[str, dict[str, Any]] = {"fsdp2": {}, "fsdp1": {"fsdp1": True}}
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for strategy, chosen in strategies.items():
            for kind in KINDS:
                name = f"{strategy}-{kind}"
                directory, logger = folder / name, runs.memory()
                defense = make(folder, kind)

                def options(given: Any = chosen) -> dict[str, Any]:
                    return {"strategy": CPUStrategy()} if given else {}

                saving = [runs.saving(directory)]
                runs.train(
                    *(defense, folder, 2, runs.NUM_STEPS),
                    logger=logger,
                    callbacks=saving,
                    **options(),
                )
                weights = whole(defense.model)
                if RANK == 0:
                    torch.save((weights, logger.history), folder / f"{name}.pt")
                placed = {} if chosen else {"language_model": {"weight_copies_on": "host"}}
                resumed = make(folder, kind, **placed)
                saved = directory / f"step-{runs.SAVED_AT:08d}.ckpt"
                runs.train(
                    *(resumed, folder, 2, runs.NUM_STEPS),
                    ckpt_path=saved,
                    weights_only=True,
                    **options(),
                )
                assert_same_parts(resumed, defense)
                print(name, flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
