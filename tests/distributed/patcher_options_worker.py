"""What two processes do for `test_patcher_options_sharded.py`; run by `in_processes`."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import AttackDistribution, Carry, FineTuningAttacker, Growth, Kind
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.attack_source import AdaptiveRefresh
from patcher_pl.defenses.extrapolation import LowRankExtrapolation
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from patcher_pl.models import Lora, Sharding
from tests.distributed import runs
from tests.distributed.fsdp1_worker import CPUStrategy
from tests.distributed.worker import assert_same_parts, whole
from tests.tiny_runs import Rows, make_llama_exact

RANK = int(os.environ.get("RANK", 0))
RETAINED = {"kl": KLToBase, "states": RepresentationDistance}
# Of simulated attacks, of the defender's own, of both, and of these with what is retained.
ON_ADAPTERS = ("adapters", "lora", "lora-adapters", "lora-states")
KINDS = (*RETAINED, "attacks", *ON_ADAPTERS)
LOX = LowRankExtrapolation(rank=2)
EXTRAPOLATED = ("attacks", "lora")


CARRIED = FineTuningAttacker(
    num_steps=2,
    optimizer=runs.ADAMW,
    carry=Carry(restart_every=3, scale=1.5, keep_optimizer=True),
)
ATTACKS = AttackDistribution(
    kinds=[
        Kind(attacker=CARRIED, space={"lr": [1e-4, 1e-2]}),
        Kind(
            attacker=replace(
                CARRIED, carry=None, num_steps=4, growth=Growth(first_steps=1, num_attacks=2)
            ),
            label="growing",
        ),
    ]
)
# A carried attack on adapters, whose first weights are random, and points on its way.
ADAPTERS = replace(
    CARRIED,
    num_steps=3,
    lora=Lora(rank=2),
    carry=Carry(restart_every=2, scale=1.5),
    vector_steps=[1, 3],
)


def make(folder: Path, kind: str, **options: Any) -> Patcher:
    """Two attack points and what is retained at theta and after the attack, or attacks that differ."""
    if kind == "attacks":
        return runs.make_patcher(
            folder / "llama",
            attacker=ATTACKS,
            adaptive_refresh=AdaptiveRefresh(min_steps=1, max_steps=3),
            **options,
        )
    if kind.startswith("lora"):
        own = {"lora": Lora(rank=2), "gradient_checkpointing": kind == "lora"}
        options["language_model"] = {**own, **options.get("language_model", {})}
        torch.manual_seed(0)  # The first weights of adapters are random.
    if kind == "lora":
        return runs.make_patcher(folder / "llama", **options)
    if kind.endswith("adapters"):
        return runs.make_patcher(folder / "llama", attacker=ADAPTERS, **options)
    benign = Rows(folder / f"benign-{os.environ.get('RANK', 'alone')}", num_safe=9)
    retain = RETAINED[kind.removeprefix("lora-")](
        data=benign.mixtures["safe"], weight=0.5, attacked_weight=0.25
    )
    attacker = FineTuningAttacker(
        num_steps=2, optimizer=runs.ADAMW, max_grad_norm=0.5, vector_steps=[1, 2]
    )
    return runs.make_patcher(folder / "llama", attacker=attacker, retain=retain, **options)


class Seeded(Callback):
    """The same random numbers from the first step on, however the model was loaded."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(0)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    strategies: dict[str, dict[str, Any]] = {"fsdp2": {}, "fsdp1": {"fsdp1": True}}
    with pytest.MonkeyPatch.context() as patch:
        make_llama_exact(patch)
        for strategy, chosen in strategies.items():
            for kind in KINDS:
                if chosen and kind in ON_ADAPTERS:
                    continue  # Refused: FSDP1's units take no further parameters.
                name = f"{strategy}-{kind}"
                directory, logger = folder / name, runs.memory()
                defense = make(folder, kind)

                def options(given: Any = chosen) -> dict[str, Any]:
                    return {"strategy": CPUStrategy()} if given else {}

                saving = [runs.saving(directory), Seeded()]
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
                if kind in EXTRAPOLATED and not chosen:
                    LOX.apply(resumed.model, resumed.language_model)
                    weights = whole(resumed.model)
                    if RANK == 0:
                        torch.save(weights, folder / f"{kind}-lox.pt")
                print(name, flush=True)
        # Refused by torch if gradients of frozen weights, which the attack trains, had another format.
        lower = {"sharding": Sharding(param_dtype="float32")}
        runs.train(make(folder, "lora", language_model=lower), folder, 2, runs.NUM_STEPS)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
