"""Settings that must agree share one trajectory; if these fail, a setting is not what it says."""

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import SGD
from tests.tiny_runs import (
    ATTACKER,
    Rows,
    adamw,
    assert_same,
    fit,
    make_llama_exact,
    sgd,
    snapshot,
)


def weights_after(defense, data, max_steps, **options):
    fit(defense, data, max_steps, **options)
    return snapshot(defense.model)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_alpha_zero_is_sft(llama, rows, clip):
    """The attacked model's loss then weighs nothing, and attacks change nothing else."""
    model = LanguageModel(path=str(llama))
    patcher = Patcher(
        model, ATTACKER, optimizer=adamw(), alpha=0.0, refresh_every=2, max_grad_norm=clip
    )
    control = SFT(model, optimizer=adamw(), max_grad_norm=clip)
    assert_same(
        weights_after(patcher, rows.module(), 7), weights_after(control, rows.module(["safe"]), 7)
    )
    assert patcher.attack_vector is not None


@pytest.mark.parametrize("method", ["sft", "patcher"])
def test_accumulated_batches_are_one_large_batch(llama, tmp_path, monkeypatch, method):
    """Clipped, since clipping every micro-batch would be a typical mistake."""
    make_llama_exact(monkeypatch)
    model = LanguageModel(path=str(llama), dtype="float64")
    # Rows of one length: the mean of means is the mean then. SGD: Adam would blow up round-off.
    rows = Rows(tmp_path, num_safe=8, even=True)
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1))
    make = {
        "sft": partial(SFT, model),
        "patcher": partial(Patcher, model, attacker, refresh_every=2, alpha=0.3),
    }[method]
    weights = [
        weights_after(
            make(optimizer=sgd(), accumulate_grad_batches=accumulated, max_grad_norm=0.2),
            rows.module(batch_size=4 // accumulated, attack_batch_size=2, group_by_length=False),
            5,
        )
        for accumulated in (1, 2, 4)
    ]
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attacked", [None, Lora(rank=2)], ids=["full-attack", "lora-attack"])
@pytest.mark.parametrize("defended", [None, Lora(rank=2)], ids=["full-model", "lora-model"])
def test_recomputing_activations_changes_nothing(llama, rows, defended, attacked):
    """Recomputation reads the weights again, which an attack and a shift move about."""
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.5), lora=attacked)
    runs = []
    for recompute in (False, True):
        model = LanguageModel(path=str(llama), gradient_checkpointing=recompute, lora=defended)
        torch.manual_seed(0)
        patcher = Patcher(model, attacker, optimizer=sgd(), refresh_every=2)
        runs.append(weights_after(patcher, rows.module(), 5))
        assert any(bool(change.any()) for change in patcher.attack_vector)
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_autocast_with_its_cache_trains_as_without(llama, rows, lora):
    """Lightning's plugin has the cache switched off; other plugins and versions may not."""

    class Caching(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=True)

    def run(**options):
        attacker = FineTuningAttacker(num_steps=3, optimizer=SGD(lr=0.5), lora=lora)
        defense = Patcher(
            LanguageModel(path=str(llama)), attacker, optimizer=adamw(1e-2), refresh_every=2
        )
        torch.manual_seed(0)
        return weights_after(defense, rows.module(), 5, **options)

    plain = run()
    mixed = run(precision="bf16-mixed")
    assert_same(run(plugins=[Caching("bf16-mixed", "cpu")]), mixed)
    assert any(not torch.equal(value, mixed[name]) for name, value in plain.items())


def test_validation_in_between_changes_nothing(llama, rows):
    """A forward pass in evaluation mode must not leave the model in it, nor move a weight."""
    runs = [
        weights_after(
            Patcher(LanguageModel(path=str(llama)), ATTACKER, optimizer=adamw(), refresh_every=2),
            rows.module(parts),
            6,
            num_sanity_val_steps=1,
        )
        for parts in (("safe", "attack"), ("safe", "attack", "val"))
    ]
    assert_same(*runs)
