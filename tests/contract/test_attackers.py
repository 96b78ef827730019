"""What a defense may expect of every simulated attacker; a new one must be added to the table."""

import inspect
from itertools import pairwise

import pytest
import torch

from patcher_pl import attackers
from patcher_pl.attackers import Attacker, ConcurrentAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.errors import RunInterrupted
from patcher_pl.models import LanguageModel, Weights
from tests.attack_table import ATTACKERS
from tests.tiny_runs import adamw, assert_same, fit, load, snapshot

NAMES = sorted(ATTACKERS)
NUM_DRAWS = 12


def test_every_attacker_is_in_the_table():
    found = {
        value
        for value in vars(attackers).values()
        if inspect.isclass(value) and issubclass(value, Attacker) and not inspect.isabstract(value)
    }
    # Those of a ConcurrentAttacker run elsewhere, and are held to lock step in tests/invariant.
    assert found - {ConcurrentAttacker} == {type(attacker) for attacker in ATTACKERS.values()}


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_seed_and_number_alone(name):
    attacker = ATTACKERS[name]
    drawn = [attacker.draw(3, number) for number in range(NUM_DRAWS)]
    assert drawn == [attacker.draw(3, number) for number in reversed(range(NUM_DRAWS))][::-1]
    steps = [one.attacker.num_steps for one in drawn]
    assert attacker.num_steps >= max(steps)
    before = [attacker.steps_before(3, number) for number in range(NUM_DRAWS)]
    assert before[0] == 0
    assert [after - earlier for earlier, after in pairwise(before)] == steps[:-1]
    assert {one.kind for one in drawn} <= set(attacker.kind_names)
    assert any(one.is_carried for one in drawn) == attacker.is_carried
    assert drawn[0].begins_anew
    # Nothing is left to draw.
    assert all(one.attacker.draw(9, 5).attacker == one.attacker for one in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_modes_are_as_before_an_attack_and_one_that_is_called_off(name, gpt2, rows):
    model = load(gpt2).train()
    weights, before = Weights(model), snapshot(model)
    batches = rows.batches("attack", LanguageModel(path=str(gpt2)).load_tokenizer())
    for number in range(4):
        attacker = ATTACKERS[name].draw(1, number).attacker
        outcome = attacker.attack(model, weights, batches)
        assert len(outcome.steps) == attacker.num_steps
        assert any(bool(change.any()) for change in outcome.vector)

        def call_off() -> None:
            raise RunInterrupted("stop")

        with pytest.raises(RunInterrupted):
            attacker.attack(model, weights, batches, call_off)
        assert_same(snapshot(model), before)
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_counts_what_its_attacks_cost(name, gpt2, rows):
    """Batches of three rows, where the run has two, count twice."""
    defense = Patcher(
        LanguageModel(path=str(gpt2)), ATTACKERS[name], optimizer=adamw(), refresh_every=1
    )
    data = rows.module()
    torch.manual_seed(0)
    num_attacks = 5
    fit(defense, data, 1 + num_attacks)
    drawn = [ATTACKERS[name].draw(data.seed, number) for number in range(num_attacks)]
    steps = sum(
        one.attacker.num_steps * one.data.evaluations_per_step(data.batch_sizes[1]) for one in drawn
    )
    assert defense.cost.gradient_evaluations == 1 + 2 * num_attacks + steps
    assert defense.attack_source.num_attacks == num_attacks
