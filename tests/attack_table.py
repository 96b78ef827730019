"""Simulated attackers that differ from attack to attack, for runs of the tiny model."""

from dataclasses import replace

from patcher_pl.attackers import (
    AttackDistribution,
    Attacker,
    Carry,
    FineTuningAttacker,
    Growth,
    Kind,
)
from patcher_pl.models import Lora
from patcher_pl.optim import SGD, AdamW

PLAIN = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3))
CARRIED = replace(PLAIN, carry=Carry(restart_every=3, scale=1.5, keep_optimizer=True))
GROWING = replace(PLAIN, num_steps=4, growth=Growth(first_steps=1, num_attacks=2))
FULL_KINDS = [
    Kind(attacker=CARRIED, label="carried", space={"num_steps": [1, 3], "lr": [1e-4, 1e-2]}),
    Kind(
        attacker=replace(PLAIN, optimizer=SGD(lr=0.1, momentum=0.9)), space={"batch_size": [1, 3]}
    ),
]
SHARDABLE = AttackDistribution(kinds=FULL_KINDS)
DISTRIBUTION = AttackDistribution(
    kinds=[
        *FULL_KINDS,
        Kind(
            attacker=replace(PLAIN, lora=Lora(rank=2, dropout=0.1), carry=Carry(restart_every=2)),
            space={"lora.rank": [1, 2]},
        ),
        Kind(attacker=replace(PLAIN, trains="embeddings"), weight=2.0),
    ],
    order="at_random",
)
ATTACKERS: dict[str, Attacker] = {
    "carried": CARRIED,
    "growing": GROWING,
    "distribution": DISTRIBUTION,
    "shardable": SHARDABLE,
}
