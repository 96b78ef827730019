"""Settings that must agree share one trajectory; if these fail, a setting is not what it says."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import SGD
from tests.tiny_runs import (
    ATTACKER,
    adamw,
    assert_same,
    fit,
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
    assert patcher.attack_source.vectors


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
        assert any(bool(change.any()) for change in patcher.attack_source.vectors[-1])
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
