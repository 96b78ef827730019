"""If these fail, attacks are not drawn as the distribution says."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from patcher_pl.attackers import AttackDistribution, Carry, FineTuningAttacker, Kind
from patcher_pl.data.variant import AttackData
from patcher_pl.errors import ConfigError
from patcher_pl.models import Lora
from patcher_pl.optim import SGD, AdamW

FULL = FineTuningAttacker(num_steps=20, optimizer=AdamW(lr=1e-3), num_warmup_steps=5)
ADAPTERS = replace(FULL, lora=Lora(rank=8), num_warmup_steps=0)
SPACE = {
    "lr": [1e-5, 1e-2],
    "num_steps": [10, 1000],
    "num_warmup_steps": [0, 20],
    "poison_ratio": [0.25, 1.0],
    "batch_size": [4, 64],
    "schedule": ["constant", "cosine"],
}


def draws(attacker, number=400, seed=3):
    return [attacker.draw(seed, n) for n in range(number)]


def test_settings_are_drawn_by_seed_and_number_alone():
    found = draws(Kind(attacker=FULL, space=SPACE), 50)
    assert found == draws(Kind(attacker=FULL, space=SPACE), 50)
    assert found[7] == Kind(attacker=FULL, space=SPACE).draw(3, 7)
    assert found != draws(Kind(attacker=FULL, space=SPACE), 50, seed=4)


def test_ranges_are_drawn_by_their_logarithm():
    found = draws(Kind(attacker=FULL, space=SPACE))
    for values, low, high in (
        ([one.attacker.optimizer.lr for one in found], 1e-5, 1e-2),
        ([one.attacker.num_steps for one in found], 10, 1000),
    ):
        assert low <= min(values) < 1.3 * low
        assert high / 1.3 < max(values) <= high
        middle = math.sqrt(low * high)
        assert 0.4 < sum(value < middle for value in values) / len(values) < 0.6
    assert all(one.attacker.num_warmup_steps <= one.attacker.num_steps for one in found)
    ratios = [one.data.poison_ratio for one in found]
    assert 0.25 <= min(ratios) < 0.3
    assert 0.95 < max(ratios) <= 1.0
    sizes, schedules = (
        {one.data.batch_size for one in found},
        {one.attacker.schedule for one in found},
    )
    assert sizes == {4, 64}
    assert schedules == {"constant", "cosine"}
    # What is shown is what was taken.
    assert all(one.settings["num_steps"] == one.attacker.num_steps for one in found)
    assert all(one.settings["lr"] == one.attacker.optimizer.lr for one in found)


def test_ranks_are_chosen():
    found = draws(Kind(attacker=ADAPTERS, space={"lora.rank": [8, 16, 64]}), 60)
    assert {one.attacker.lora.rank for one in found} == {8, 16, 64}


def test_kinds_in_turn_each_with_a_count_of_its_own():
    attacker = AttackDistribution(
        kinds=[
            Kind(attacker=replace(FULL, carry=Carry(restart_every=3))),
            Kind(attacker=ADAPTERS),
        ]
    )
    found = draws(attacker, 12)
    assert [one.kind for one in found] == ["all_adamw", "lora_adamw"] * 6
    assert [one.begins_anew for one in found[::2]] == [True, False, False] * 2
    assert all(one.begins_anew and not one.is_carried for one in found[1::2])
    assert attacker.num_steps == 20
    assert attacker.is_carried
    assert attacker.works_sharded
    assert not attacker.works_with_fsdp1
    assert not attacker.is_differentiable


def test_kinds_at_random_come_by_weight():
    attacker = AttackDistribution(
        kinds=[
            Kind(attacker=replace(FULL, carry=Carry(restart_every=2)), weight=3.0),
            Kind(attacker=ADAPTERS, weight=1.0),
        ],
        order="at_random",
    )
    found = draws(attacker, 200)
    assert 0.65 < Counter(one.kind for one in found)["all_adamw"] / 200 < 0.85
    carried = [one.begins_anew for one in found if one.kind == "all_adamw"]
    assert carried == [n % 2 == 0 for n in range(len(carried))]


def test_steps_before_are_those_of_the_attacks_before():
    attacker = AttackDistribution(kinds=[Kind(attacker=FULL, space={"num_steps": [10, 40]})])
    found = draws(attacker, 10)
    assert attacker.steps_before(3, 10) == sum(one.attacker.num_steps for one in found)
    assert attacker.num_steps == 40


def test_a_larger_batch_counts_as_the_batches_it_amounts_to():
    assert AttackData(batch_size=64).evaluations_per_step(16) == 4
    assert AttackData(batch_size=20).evaluations_per_step(16) == 2
    assert AttackData(batch_size=4).evaluations_per_step(16) == 1
    assert AttackData().evaluations_per_step(16) == 1


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"lrr": [1e-4, 1e-3]}, r"space must be fields of `attacker`.*'lrr'"),
        ({"optimizer": [1]}, "space must be fields of `attacker`"),
        ({"lora.rank": [8]}, "space must be fields of `attacker`"),
        ({"lr": [1e-3, 1e-4]}, "space.lr must be .low, high."),
        ({"lr": [0.0, 1e-4]}, "space.lr must be .low, high. with low <= high, above 0"),
        ({"num_steps": [10]}, "space.num_steps must be .low, high."),
        ({"schedule": []}, "space.schedule must be choices"),
        ({"schedule": ["sometimes"]}, "schedule cannot be 'sometimes'"),
        ({"poison_ratio": [0.5, 2.0]}, r"poison_ratio must be in \[0, 1\]"),
        ({"batch_size": [0]}, "batch_size must be >= 1"),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused(space, said):
    with pytest.raises(ValueError, match=said):
        Kind(attacker=FULL, space=space)


def test_kinds_must_be_told_apart():
    with pytest.raises(ValueError, match="kinds must be kinds of different names"):
        AttackDistribution(kinds=[Kind(attacker=FULL), Kind(attacker=FULL)])
    with pytest.raises(ValueError, match="kinds must be kinds of different names"):
        AttackDistribution(kinds=[])
    sgd = Kind(attacker=replace(FULL, optimizer=SGD(lr=0.1)), weight=2.0)
    with pytest.raises(ValueError, match="order must be at_random where weights differ"):
        AttackDistribution(kinds=[Kind(attacker=FULL), sgd])


def test_what_is_not_drawn_cannot_attack():
    attacker = AttackDistribution(kinds=[Kind(attacker=FULL)])
    with pytest.raises(ConfigError, match="Take the attacker of one of its draws"):
        attacker.inner_problem(iter([]))
