"""Packed batches must train as padded ones do, or be refused; if these fail, packing changes results."""

from functools import partial

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Booster, Defense, Patcher, TVaccine, Vaccine
from patcher_pl.defenses.retention import KLToBase, RepresentationDistance
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import SGD, AdamW
from tests.defense_table import TABLE, build
from tests.estimator_table import HIGHER_ORDER
from tests.families import build_family
from tests.tiny_runs import MemoryLogger, fit, make_llama_exact, sgd, snapshot

ATTACKER = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.3), max_grad_norm=0.5)
PARTS = ("safe", "attack", "val")
PACKABLE = {
    "sft": partial(SFT),
    "patcher": partial(Patcher, attacker=ATTACKER, refresh_every=2, alpha=0.3),
    "patcher-lora-attack": partial(
        Patcher,
        attacker=FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.3), lora=Lora(rank=2)),
        refresh_every=2,
    ),
    "booster": partial(Booster),
    "vaccine": partial(Vaccine),
    "t-vaccine": partial(TVaccine, num_layers=1, resample_every=2, measure_every=3),
}


def run(make, path, data, max_steps: int = 4, **options):
    torch.manual_seed(0)
    model = LanguageModel(path=str(path), dtype="float64", **options)
    defense, logger = make(language_model=model, optimizer=sgd()), MemoryLogger()
    fit(defense, data, max_steps, logger=logger)
    return defense, logger.history


def assert_alike(padded, packed, tolerance: float) -> None:
    (ours, logged), (theirs, expected) = packed, padded
    assert ours.cost == theirs.cost
    weights = snapshot(ours.model)
    for name, value in snapshot(theirs.model).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=tolerance, msg=name)
    for metric, values in expected.items():
        assert logged[metric] == pytest.approx(values, rel=1e-5, abs=1e-7), metric


def test_every_defense_that_takes_packed_batches_is_tested():
    packable = {kind for kind in TABLE if kind.supports_packing}
    assert packable == {make.func for make in PACKABLE.values()}


@pytest.mark.parametrize("make", PACKABLE.values(), ids=PACKABLE)
def test_packed_runs_end_where_padded_ones_do(llama, rows, monkeypatch, make):
    """Weights, everything logged, validation included, and the cost."""
    make_llama_exact(monkeypatch)
    padded, packed = (
        run(make, llama, rows.module(PARTS, packing=packing)) for packing in (False, True)
    )
    assert len(padded[1]["val/loss"]) > 0
    assert_alike(padded, packed, tolerance=1e-9)


@pytest.mark.parametrize("strategy", [KLToBase, RepresentationDistance])
def test_retention_sees_the_same_conversations(llama, rows, monkeypatch, strategy):
    """Wrong if a conversation read on into the next one where the base model is compared."""
    make_llama_exact(monkeypatch)
    retain = strategy(data=rows.mixtures["val"], attacked_weight=0.5)
    make = partial(PACKABLE["patcher"], retain=retain)
    padded, packed = (run(make, llama, rows.module(packing=packing)) for packing in (False, True))
    assert padded[1]["train/retain_distance_attacked"]
    assert_alike(padded, packed, tolerance=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_and_recomputation(llama, rows, monkeypatch, recompute):
    make_llama_exact(monkeypatch)
    ways = {"gradient_checkpointing": recompute, "lora": Lora(rank=2)}
    padded, packed = (
        run(PACKABLE["patcher"], llama, rows.module(PARTS, packing=packing), **ways)
        for packing in (False, True)
    )
    assert_alike(padded, packed, tolerance=1e-9)


@pytest.mark.parametrize("estimator", HIGHER_ORDER.values(), ids=HIGHER_ORDER)
def test_hypergradients_of_packed_attacks(llama, rows, monkeypatch, estimator):
    """They differentiate twice, or forward: the lean cross-entropy must not get in their way."""
    make_llama_exact(monkeypatch)
    make = partial(
        Patcher, attacker=ATTACKER, refresh_every=1, num_sft_steps=0, hypergradient=estimator
    )
    padded, packed = (
        run(make, llama, rows.module(packing=packing), max_steps=2) for packing in (False, True)
    )
    weights = snapshot(packed[0].model)
    for name, value in snapshot(padded[0].model).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [kind for kind in TABLE if not kind.supports_packing])
def test_defenses_that_cannot_say_so(llama, rows, kind: type[Defense]):
    with pytest.raises(ConfigError, match=rf"data\.packing: {kind.__name__} reads padded batches"):
        fit(build(kind, llama), rows.module(packing=True), 1)


def test_models_that_cannot_are_refused_before_training(tmp_path, rows):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig

    source = build_family("qwen2", tmp_path / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    config = MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    defense = SFT(LanguageModel(path=str(tmp_path / "mamba")), optimizer=sgd())
    with pytest.raises(ConfigError, match=r"data\.packing: MambaForCausalLM takes no position_ids"):
        fit(defense, rows.module(packing=True), 1)
    assert defense.global_step == 0


def test_a_fused_optimizer_takes_the_same_steps(llama, rows):
    """Through Lightning and our clipping, in defense and attack; other rounding, same equation."""
    found = []
    for fused in (False, True):
        patcher = Patcher(
            LanguageModel(path=str(llama), dtype="float64"),
            FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3, eps=1e-4, fused=fused)),
            optimizer=lambda p, fused=fused: torch.optim.AdamW(p, 1e-3, eps=1e-4, fused=fused),
            refresh_every=2,
            max_grad_norm=0.1,
        )
        fit(patcher, rows.module(), 5)
        assert patcher.optimizers().optimizer.defaults["fused"] is fused
        found.append(snapshot(patcher.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6, msg=name)
