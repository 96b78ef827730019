"""If these fail, an attack does not go on where the last one ended."""

import pytest
import torch

from patcher_pl.attackers import Carried, Carry, FineTuningAttacker, Growth
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import SGD, AdamW
from tests.tiny_runs import assert_same, load, snapshot

NUM_STEPS = 4


def unsafe(rows, path):
    return rows.batches("attack", LanguageModel(path=str(path)).load_tokenizer())


def attack(model, batches, start=None, *, num_steps, optimizer=None, **settings):
    attacker = FineTuningAttacker(
        num_steps=num_steps, optimizer=optimizer or AdamW(lr=1e-2), **settings
    )
    return attacker.attack(model, Weights(model), batches, start=start)


def end_of(outcome):
    return Carried(outcome.vector, len(outcome.steps), outcome.moments)


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "carry"),
    [
        (SGD(lr=0.1), Carry()),
        (SGD(lr=0.1, momentum=0.9), Carry(keep_optimizer=True)),
        (AdamW(lr=1e-2), Carry(keep_optimizer=True)),
    ],
    ids=["no-moments", "momentum", "adamw"],
)
def test_two_halves_with_what_is_remembered_are_one_attack(llama, rows, optimizer, carry):
    model, batches = load(llama).train(), unsafe(rows, llama)
    before = snapshot(model)
    options = {"optimizer": optimizer, "carry": carry}
    first = attack(model, batches, num_steps=NUM_STEPS, **options)
    second = attack(model, batches, end_of(first), num_steps=NUM_STEPS, **options)
    assert_same(snapshot(model), before)
    whole = attack(model, unsafe(rows, llama), num_steps=2 * NUM_STEPS, optimizer=optimizer)
    assert_close(second.vector, whole.vector)
    assert second.num_steps_from(end_of(first)) == 2 * NUM_STEPS


def test_without_the_moments_the_optimizer_starts_anew(llama, rows):
    model, batches = load(llama).train(), unsafe(rows, llama)
    first = attack(model, batches, num_steps=NUM_STEPS, carry=Carry())
    second = attack(model, batches, end_of(first), num_steps=NUM_STEPS, carry=Carry())
    restarted = attack(
        model, unsafe(rows, llama), num_steps=2 * NUM_STEPS, optimizer_restart_every=NUM_STEPS
    )
    assert_close(second.vector, restarted.vector)
    assert [step.index for step in restarted.steps] == list(range(1, 2 * NUM_STEPS + 1))


def test_a_stretched_vector_is_begun_beyond(llama, rows):
    model = load(llama).train()
    first = attack(model, unsafe(rows, llama), num_steps=NUM_STEPS)
    still = {"num_steps": 1, "optimizer": AdamW(lr=1e-12, weight_decay=0.0)}
    second = attack(model, unsafe(rows, llama), end_of(first), carry=Carry(scale=3.0), **still)
    assert_close(second.vector, [3 * change for change in first.vector])


def test_adapters_go_on_from_the_merged_model(llama, rows):
    """The change of the second attack is of its own rank, on top of the first."""
    torch.manual_seed(0)
    model, batches, options = load(llama).train(), unsafe(rows, llama), {"num_steps": NUM_STEPS}
    before = snapshot(model)
    options |= {"lora": Lora(rank=1, alpha=8.0), "carry": Carry()}
    first = attack(model, batches, **options)
    second = attack(model, batches, end_of(first), **options)
    assert_same(snapshot(model), before)
    named = dict(zip(Weights(model).names, second.vector, strict=True))
    ranks = [
        int(torch.linalg.matrix_rank(change.double(), atol=1e-4))
        for name, change in named.items()
        if "proj" in name
    ]
    assert max(ranks) == 2


def test_embeddings_alone_move(llama, rows):
    model = load(llama).train()
    before = snapshot(model)
    outcome = attack(model, unsafe(rows, llama), num_steps=2, trains="embeddings")
    assert_same(snapshot(model), before)
    moved = {
        name
        for name, change in zip(Weights(model).names, outcome.vector, strict=True)
        if bool(change.any())
    }
    assert moved == {"model.embed_tokens.weight"}


def test_when_attacks_begin_anew():
    carry = Carry(restart_every=3)
    assert [carry.begins_anew(0, n) for n in range(7)] == [n % 3 == 0 for n in range(7)]
    assert [Carry().begins_anew(0, n) for n in range(4)] == [True, False, False, False]
    drawn = [Carry(restart_probability=0.25).begins_anew(5, n) for n in range(1, 2001)]
    assert 0.2 < sum(drawn) / len(drawn) < 0.3
    assert drawn == [Carry(restart_probability=0.25).begins_anew(5, n) for n in range(1, 2001)]


def test_growing_attacks():
    growth = Growth(first_steps=10, num_attacks=4)
    attacker = FineTuningAttacker(num_steps=160, optimizer=AdamW(lr=1e-3), growth=growth)
    lengths = [attacker.draw(0, number).attacker.num_steps for number in range(6)]
    assert lengths == [10, 20, 40, 80, 160, 160]
    assert attacker.steps_before(0, 5) == sum(lengths[:5])
    linear = Growth(first_steps=10, num_attacks=3, curve="linear")
    assert [linear.num_steps(100, number) for number in range(5)] == [10, 40, 70, 100, 100]


def test_points_at_random():
    attacker = FineTuningAttacker(num_steps=50, optimizer=AdamW(lr=1e-3), num_random_points=4)
    assert attacker.num_vectors == 4
    drawn = [attacker.draw(1, number).attacker.vector_steps for number in range(20)]
    assert all(len(set(points)) == 4 and points[-1] == 50 for points in drawn)
    assert all(points == sorted(points) for points in drawn)
    assert len({tuple(points) for points in drawn}) > 10
    assert drawn == [attacker.draw(1, number).attacker.vector_steps for number in range(20)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_random_points": 5}, "num_random_points must be in 1..num_steps"),
        ({"num_random_points": 2, "vector_steps": [2, 4]}, "vector_steps must be null with"),
        ({"optimizer_restart_every": 0}, "optimizer_restart_every must be >= 1"),
        ({"trains": "embeddings", "lora": Lora(rank=1)}, "trains must be all, or embeddings"),
        (
            {"carry": Carry(keep_optimizer=True), "lora": Lora(rank=1)},
            "carry.keep_optimizer must be false with",
        ),
        (
            {"carry": Carry(keep_optimizer=True), "optimizer": AdamW(lr=1e-3, eps_root=1e-8)},
            "carry.keep_optimizer must be false with",
        ),
        (
            {
                "carry": Carry(keep_optimizer=True),
                "optimizer": AdamW(lr=1e-3, state_dtype="bfloat16"),
            },
            "carry.keep_optimizer must be false with .+ or a `state_dtype`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, said):
    settings = {"num_steps": 4, "optimizer": AdamW(lr=1e-3), **settings}
    with pytest.raises(ValueError, match=said):
        FineTuningAttacker(**settings)


def test_a_carried_attack_is_not_differentiated(llama, rows):
    attacker = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3), carry=Carry())
    assert not attacker.is_differentiable
    with pytest.raises(ValueError, match="carry must be null for an attack that is differentiated"):
        attacker.inner_problem(unsafe(rows, llama))
