"""LoX against its equation, W + alpha U_k S_k V_k^T of W - W_base, computed apart in numpy."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from patcher_pl.defenses import SFT
from patcher_pl.defenses.extrapolation import LowRankExtrapolation
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Lora, merged_copy
from tests.tiny_runs import adamw

ALPHA, RANK = 0.75, 2


def nudged(model, seed=0, scale=0.1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def extrapolated(aligned, base, rank=RANK):
    """The source's equation, weight by weight."""
    if aligned.ndim < 2:
        return aligned
    left, values, right = np.linalg.svd(aligned - base, full_matrices=False)
    return aligned + ALPHA * left[:, :rank] * values[:rank] @ right[:rank]


def values(model):
    return {
        name: value.detach().double().numpy().copy() for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("rank", [RANK, None])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_matrix_goes_on_and_vectors_stay(rank, dtype, llama):
    language_model = LanguageModel(path=str(llama), dtype=dtype)
    base, model = values(language_model.load_model()), nudged(language_model.load_model())
    before = values(model)
    LowRankExtrapolation(rank=rank, alpha=ALPHA).apply(model, language_model)
    tolerance = 1e-12 if dtype == "float64" else 2e-2
    after = values(model)
    for name, aligned in before.items():
        expected = extrapolated(aligned, base[name], rank or 10**6)
        np.testing.assert_allclose(after[name], expected, atol=tolerance, err_msg=name)
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert moved == [name for name, value in before.items() if value.ndim > 1]


def test_base_is_any_release_of_the_architecture(llama, tmp_path):
    language_model = LanguageModel(path=str(llama), dtype="float64")
    other = nudged(language_model.load_model(), seed=5)
    other.save_pretrained(tmp_path / "other")
    model = language_model.load_model()
    before = values(model)
    extrapolation = LowRankExtrapolation(rank=RANK, alpha=ALPHA, base=str(tmp_path / "other"))
    (tmp_path / "other" / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    extrapolation.apply(model, language_model)
    theirs = values(other)
    for name, value in values(model).items():
        expected = extrapolated(before[name], theirs[name])
        np.testing.assert_allclose(value, expected, atol=1e-12, err_msg=name)


def test_adapters_go_on_by_themselves(llama):
    """Wrong if the merged model were not the one that LoX makes of the merged model."""
    language_model = LanguageModel(path=str(llama), dtype="float64", lora=Lora(rank=4))
    base = values(LanguageModel(path=str(llama), dtype="float64").load_model())
    model = nudged(language_model.load_model())
    before = values(merged_copy(model))
    LowRankExtrapolation(rank=RANK, alpha=ALPHA).apply(model, language_model)
    for name, value in values(merged_copy(model)).items():
        expected = extrapolated(before[name], base[name])
        np.testing.assert_allclose(value, expected, atol=1e-10, err_msg=name)


def test_another_base_for_adapters_is_refused(llama):
    language_model = LanguageModel(path=str(llama), lora=Lora(rank=2))
    with pytest.raises(ConfigError, match=r"base must be null with language_model\.lora"):
        LowRankExtrapolation(base=str(llama)).apply(language_model.load_model(), language_model)


def test_a_base_of_another_shape_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 8}
    wider = type(AutoModelForCausalLM.from_pretrained(llama).config)(**config)
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path)
    language_model = LanguageModel(path=str(llama))
    with pytest.raises(ConfigError, match=r"has \[8, \d+\] where the model has .*gate_proj"):
        LowRankExtrapolation(base=str(tmp_path)).apply(language_model.load_model(), language_model)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0)])
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"LowRankExtrapolation\.{field} must be"):
        LowRankExtrapolation(**{field: value})


def test_results_tell_an_extrapolated_model_from_the_control(llama):
    """Wrong if it were called `sft`, which marks the undefended control."""
    defense = SFT(LanguageModel(path=str(llama)), adamw(), extrapolation=LowRankExtrapolation())
    assert defense.name == "sft_lox"
