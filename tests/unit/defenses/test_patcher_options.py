"""If these fail, options of Patcher that do not go together start a run all the same."""

import pytest
import torch

from patcher_pl.attackers import ConcurrentAttacker, FineTuningAttacker, Member
from patcher_pl.data import Mixture, Source
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.base_model import BaseModel
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from patcher_pl.errors import DataError
from patcher_pl.hypergradients import Adjoint
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import SGD
from tests.tiny_runs import ATTACKER, MemoryLogger, adamw, assert_same, fit, load, snapshot

NOWHERE = Mixture(sources=[Source(path="nowhere.jsonl")])
POINTS = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1), vector_steps=[1, 2])


@pytest.mark.parametrize(
    ("attacker", "options", "message"),
    [
        (POINTS, {"hypergradient": Adjoint()}, r"attacker\.vector_steps must be null .*\[1, 2\]"),
        (POINTS, {"combine_points": "sum"}, r"combine_points must be one of average, .* got 'sum'"),
        (
            ConcurrentAttacker(population=[Member(attacker=ATTACKER)]),
            {"combine_points": "in_turn"},
            r"combine_points must be average with a ConcurrentAttacker.*got 'in_turn'.*attacker\.combine",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(attacker, options, message):
    with pytest.raises(ValueError, match=rf"Patcher\.{message}"):
        Patcher(LanguageModel(path="nowhere"), attacker, **options)


@pytest.mark.parametrize("kind", [KLToBase, RepresentationDistance])
def test_weights_of_a_retention(kind):
    for field in ("weight", "attacked_weight"):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field} must be >= 0, got -1"):
            kind(data=NOWHERE, **{field: -1})
    with pytest.raises(ValueError, match=r"got 0 for both\. Set `Patcher\.retain: null`"):
        kind(data=NOWHERE, weight=0)


def test_missing_benign_data_are_missed_before_the_first_step(llama, rows):
    defense = Patcher(LanguageModel(path=str(llama)), ATTACKER, retain=KLToBase(data=NOWHERE))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        fit(defense, rows.module(), 1)
    assert defense.cost.gradient_evaluations == 0


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("place", ["model", "host"])
def test_the_base_model_comes_and_goes(gpt2, lora, place):
    """It computes what was loaded, without dropout, after training; nothing is left of it."""
    model = load(gpt2, lora=lora)
    batch = torch.arange(12).reshape(2, 6) + 20
    expected = load(gpt2)(batch).logits
    weights = Weights(model, place)
    base = BaseModel(model, weights, has_adapters=lora is not None)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trained = snapshot(model)
    base.place()
    with base.in_place() as found, torch.no_grad():
        torch.testing.assert_close(found(batch).logits, expected)
    assert_same(snapshot(model), trained)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_base_model_has_the_format_of_the_run(llama, rows, precision):
    """The first step moves nothing but the learning rate 0: the distance is that of equal models."""
    logger = MemoryLogger()
    defense = Patcher(
        *(LanguageModel(path=str(llama)), ATTACKER),
        optimizer=adamw(0.0),
        num_sft_steps=1,
        retain=KLToBase(data=rows.mixtures["val"], attacked_weight=1.0),
    )
    fit(defense, rows.module(), 3, logger=logger, precision=precision)
    assert set(logger.history["train/retain_distance"].values()) == {0.0}
    assert min(logger.history["train/retain_distance_attacked"].values()) > 0


def test_nothing_is_retained_where_nothing_is_asked_for(llama, rows):
    """And the distance after the attack not before there is one."""
    benign = rows.mixtures["val"]
    logger = MemoryLogger()
    retain = RepresentationDistance(data=benign, weight=0.0, attacked_weight=2.0)
    defense = Patcher(
        *(LanguageModel(path=str(llama)), ATTACKER),
        optimizer=adamw(),
        num_sft_steps=2,
        refresh_every=2,
        retain=retain,
    )
    fit(defense, rows.module(), 4, logger=logger)
    assert "train/retain_distance" not in logger.history
    assert sorted(logger.history["train/retain_distance_attacked"]) == [3, 4]
    assert defense.cost.gradient_evaluations == 2 + 2 * 3 + ATTACKER.num_steps


def test_the_base_model_is_neither_trained_nor_saved(llama, rows):
    retain = KLToBase(data=rows.mixtures["val"])
    defense = Patcher(LanguageModel(path=str(llama)), ATTACKER, optimizer=adamw(), retain=retain)
    fit(defense, rows.module(), 2)
    assert defense.state_dict().keys() == {f"_model.{name}" for name in load(llama).state_dict()}
    defense.release()
    assert defense._retained is None
