"""If these fail, Patcher attacks at the wrong time, or its cost is not what it claims."""

import pytest

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from tests.tiny_runs import MemoryLogger, adamw, fit, load

K1 = 3


def make(path, **options):
    attacker = FineTuningAttacker(num_steps=K1, optimizer=AdamW(lr=1e-3))
    return Patcher(LanguageModel(path=str(path)), attacker, optimizer=adamw(), **options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("options", "attacked_at"),
    [
        ({"refresh_every": 2}, [2, 4, 6]),
        ({"refresh_every": 3, "num_sft_steps": 1}, [1, 4]),
        ({"refresh_every": 2, "num_sft_steps": 0}, [0, 2, 4, 6]),
        ({"refresh_every": 1, "num_sft_steps": 4}, [4, 5, 6]),
        ({"refresh_every": 7}, []),
    ],
)
def test_attacks_come_when_they_are_due(llama, rows, options, attacked_at, accumulate):
    logger = MemoryLogger()
    defense = make(llama, accumulate_grad_batches=accumulate, **options)
    fit(defense, rows.module(), 7, logger=logger)
    assert list(logger.history.get("attack/vector_norm", {})) == attacked_at
    assert list(logger.history.get("attack/loss_by_attack_step", {})) == list(
        range(1, K1 * len(attacked_at) + 1)
    )
    first = attacked_at[0] if attacked_at else 7
    attacked_steps = list(range(first + 1, 8))
    assert list(logger.history.get("train/loss_attacked", {})) == attacked_steps
    gaps = logger.history.get("train/attack_gap", {})
    for step in attacked_steps:
        attacked, safe = (logger.history[f"train/loss_{k}"][step] for k in ("attacked", "safe"))
        assert gaps[step] == pytest.approx(attacked - safe, abs=1e-6)

    # One gradient per batch at theta, one at theta + v, one per attack step.
    count = accumulate * (7 + len(attacked_steps)) + K1 * len(attacked_at)
    assert defense.cost.gradient_evaluations == count
    safe = rows.batches("safe", defense.tokenizer)
    unsafe = rows.batches("attack", defense.tokenizer)
    tokens = sum(
        int(next(safe)["attention_mask"].sum()) * (2 if step in attacked_steps else 1)
        for step in range(1, 8)
        for _ in range(accumulate)
    )
    tokens += sum(int(next(unsafe)["attention_mask"].sum()) for _ in range(K1 * len(attacked_at)))
    assert defense.cost.tokens == tokens


def test_the_cost_of_sft(llama, rows):
    defense = SFT(LanguageModel(path=str(llama)), optimizer=adamw(), accumulate_grad_batches=2)
    fit(defense, rows.module(["safe"]), 3)
    safe = rows.batches("safe", defense.tokenizer)
    assert defense.cost.gradient_evaluations == 6
    assert defense.cost.tokens == sum(int(next(safe)["attention_mask"].sum()) for _ in range(6))


def test_the_first_round_is_sft_for_as_long_as_any_round():
    defense = Patcher(
        LanguageModel(path="nowhere"),
        FineTuningAttacker(num_steps=1, optimizer=AdamW(lr=1)),
        refresh_every=9,
    )
    assert defense.attack_source.num_sft_steps == 9


def test_names_and_k1_in_results(llama):
    assert (make(llama).name, make(llama).num_attack_steps) == ("patcher", K1)
    control = SFT(LanguageModel(path=str(llama)))
    assert (control.name, control.num_attack_steps) == ("sft", None)


def test_building_a_defense_loads_nothing():
    """Every shipped config must be buildable on a laptop."""
    assert SFT(LanguageModel(path="nowhere/to-be-found")).accumulate_grad_batches == 1


def test_attacked_and_plain_losses_are_true_losses(llama, rows):
    """Not scaled by alpha or by accumulation, and taken before the step."""
    logger = MemoryLogger()
    defense = make(llama, num_sft_steps=0, refresh_every=5, alpha=0.9)
    fit(defense, rows.module(), 1, logger=logger)
    model = load(llama)
    batch = next(rows.batches("safe", defense.tokenizer))
    before = differentiable_loss(model, batch).item()
    assert logger.history["train/loss_safe"][1] == pytest.approx(before, rel=1e-5)
    for parameter, change in zip(
        model.parameters(), defense.attack_source.vectors[-1], strict=True
    ):
        parameter.data.add_(change)
    attacked = differentiable_loss(model, batch).item()
    assert logger.history["train/loss_attacked"][1] == pytest.approx(attacked, rel=1e-5)
