"""If these fail, vectors from within an attack are not those of an attack that ended there."""

import re

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker, Member
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import AdamW
from tests.tiny_runs import assert_same, load, snapshot


def attacker(num_steps=4, vector_steps=None, lora=None):
    return FineTuningAttacker(
        num_steps=num_steps, optimizer=AdamW(lr=1e-2), lora=lora, vector_steps=vector_steps
    )


def attack(one, path, rows, place="model"):
    torch.manual_seed(0)
    model = load(path).train()
    before = snapshot(model)
    batches = rows.batches("attack", LanguageModel(path=str(path)).load_tokenizer())
    torch.manual_seed(1)
    outcome = one.attack(model, Weights(model, place), batches)
    assert_same(snapshot(model), before)
    return outcome, torch.get_rng_state()


@pytest.mark.parametrize("place", ["model", "host"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_every_vector_is_that_of_an_attack_that_ends_there(model, rows, lora, place, request):
    """To the last bit: taking one changes neither the attack nor the random numbers after it."""
    path = request.getfixturevalue(model)
    outcome, random_state = attack(attacker(4, [1, 3, 4], lora), path, rows, place)
    assert len(outcome.vectors) == 3
    assert outcome.vectors[-1] is outcome.vector
    for num_steps, vector in zip([1, 3, 4], outcome.vectors, strict=True):
        alone, state = attack(attacker(num_steps, None, lora), path, rows)
        assert not alone.earlier
        pairs = zip(vector, alone.vector, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert torch.equal(random_state, state)
    assert [step.index for step in outcome.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [[], [0, 4], [2, 2, 4], [3, 1, 4], [2, 3], [4, 5]])
def test_points_outside_of_the_attack_are_refused(steps):
    message = rf"vector_steps must be .* num_steps = 4, or null, got {re.escape(str(steps))}\. Use"
    with pytest.raises(ValueError, match=message):
        attacker(4, steps)


def test_a_mailbox_carries_one_vector():
    """Wrong if a concurrent attacker dropped the others without a word."""
    with pytest.raises(ValueError, match=r"Member\.attacker .* got 2 .*Set `vector_steps: null`"):
        Member(attacker=attacker(4, [2, 4]))
    Member(attacker=attacker(4, [4]))
