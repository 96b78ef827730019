"""DeltaStrip: what is left of a release once an attacker goes back to its sibling."""

import math
import pickle

import pytest
import torch

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Lora, merged_copy
from patcher_pl.optim import SGD
from patcher_pl.redteam import (
    Abliteration,
    Asking,
    AttackMaterial,
    DeltaStrip,
    FullFinetuning,
    LoraFinetuning,
)
from patcher_pl.redteam.delta_strip import cliff
from patcher_pl.types import Conversation, Message
from tests.numerics.test_low_rank_extrapolation import nudged

ROWS = [
    Conversation(
        (Message("user", f"{'Brew' if harmful else 'Pour'} {word}?"), Message("assistant", word)),
        harmful=harmful,
        origin=word,
    )
    for word in ("honey", "petals", "tea")
    for harmful in (True, False)
]
TRAINING = {"optimizer": SGD(lr=0.1), "attack_steps": [0, 2, 3], "batch_size": 2}


@pytest.fixture
def sibling(llama):
    return LanguageModel(path=str(llama), dtype="float64")


@pytest.fixture
def material(sibling):
    return AttackMaterial(sibling.load_tokenizer(), ChatFormat(), ROWS, 0, sibling=sibling)


def state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_what_is_left_is_a_share_of_the_change(kept, sibling, material):
    reference, model = state(sibling.load_model()), nudged(sibling.load_model())
    released = state(model)
    (point,) = DeltaStrip(kept=kept).run(model, material)
    assert (point.steps, point.num_tokens) == (0, 0)
    for name, value in state(model).items():
        expected = reference[name] + kept * (released[name] - reference[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)
        if kept == 0:
            assert torch.equal(value, reference[name])


def test_the_released_model_is_measured_first_and_the_rest_is_the_attack_after_the_strip(
    sibling, material
):
    """Wrong if a stripped model passed for the released one, by whose usefulness others are bounded."""
    model, stripped = nudged(sibling.load_model()), sibling.load_model()
    released, then = state(model), FullFinetuning(**TRAINING)
    attack = DeltaStrip(then=then)
    steps = []
    for point in attack.run(model, material):
        steps.append((point.steps, point.remark is not None))
        if point.steps == 0:
            assert all(torch.equal(value, released[name]) for name, value in state(model).items())
    assert steps == [(0, False), (2, True), (3, False)]
    list(then.run(stripped, material))
    for name, value in state(model).items():
        torch.testing.assert_close(value, state(stripped)[name], rtol=0, atol=1e-14)


def test_an_attack_without_steps_may_follow(sibling, material):
    attack = DeltaStrip(kept=0.15, then=Abliteration(num_prompts=2))
    (point,) = attack.run(nudged(sibling.load_model()), material)
    assert point.remark
    assert attack.name == "delta_strip_0.15_abliteration"
    assert attack.needed_rows == {"harmful", "benign"}


def test_adapters_are_given_away_and_full_training_is_not(sibling, material, llama):
    """The sign of a defense that was trained with LoRA, which merging does not hide."""
    adapted = LanguageModel(path=str(llama), dtype="float64", lora=Lora(rank=3)).load_model()
    released = merged_copy(nudged(adapted))
    (point,) = DeltaStrip().run(released, material)
    assert "cliff after singular value 3 " in point.remark
    assert "adapters of such a rank" in point.remark
    (point,) = DeltaStrip().run(nudged(sibling.load_model()), material)
    assert "all weights were trained" in point.remark
    (point,) = DeltaStrip().run(sibling.load_model(), material)
    assert "does not differ from its sibling" in point.remark


def test_the_cliff_of_a_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(12, 2) @ torch.randn(2, 9)
    rank, ratio = cliff(matrix + 1e-4 * torch.randn(12, 9))
    assert rank == 2
    assert ratio > 1e3
    assert cliff(torch.randn(40, 40))[1] < 3
    assert cliff(torch.zeros(3, 3)) == (0, 1.0)
    assert cliff(torch.ones(1, 3)) == (0, 1.0)


def test_it_asks_trains_and_draws_as_what_follows_does():
    """Wrong if questions were worded otherwise than rows."""
    asking = Asking(template="Please: {prompt}", prefill="So,", scope="harmful")
    then = LoraFinetuning(**TRAINING, lora=Lora(rank=2), asking=asking)
    attack = DeltaStrip(then=then)
    assert attack.asking == attack.wording == attack.row_wording == asking
    assert attack.uses_data
    outer = DeltaStrip(then=LoraFinetuning(**TRAINING, lora=Lora(rank=2)), asking=asking)
    assert outer.then.asking == asking
    assert pickle.loads(pickle.dumps(outer)) == outer
    assert not DeltaStrip().uses_data
    assert DeltaStrip().row_wording is None


def test_a_missing_sibling_is_named(sibling, material):
    alone = AttackMaterial(material.tokenizer, ChatFormat(), ROWS, 0)
    with pytest.raises(ConfigError, match=r"needs a public sibling .* Target\.sibling"):
        list(DeltaStrip().run(sibling.load_model(), alone))


def test_a_share_out_of_range_is_refused():
    for kept in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"DeltaStrip\.kept must be in \[0, 1\)"):
            DeltaStrip(kept=kept)
