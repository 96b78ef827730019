"""If these fail, Patcher breaks on adapters or tied weights."""

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.models import LanguageModel, Lora, export_model
from patcher_pl.optim import AdamW
from tests.tiny_runs import adamw, fit, load, snapshot

LORA = Lora(rank=2)


def run(path, rows, *, defended=None, attacked=None, steps=5):
    attacker = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-2), lora=attacked)
    defense = Patcher(
        LanguageModel(path=str(path), lora=defended), attacker, optimizer=adamw(), refresh_every=2
    )
    torch.manual_seed(0)
    fit(defense, rows.module(), steps)
    return defense


@pytest.mark.parametrize("attacked", [None, LORA], ids=["full-attack", "lora-attack"])
def test_adapters_are_trained_and_nothing_else(llama, rows, tmp_path, attacked):
    defense = run(llama, rows, defended=LORA, attacked=attacked)
    base = load(llama).state_dict()
    trained = dict(defense.model.named_parameters())
    assert {name for name, p in trained.items() if p.requires_grad} == {
        name for name in trained if ".lora_" in name
    }
    under = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trained.items()
        if ".lora_" not in name
    }
    assert under.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in under.items())
    assert all(float(p.detach().abs().max()) > 0 for n, p in trained.items() if ".lora_B" in n)
    # The vector moves merged weights: it has nothing of adapters, in names or in shapes.
    assert defense.all_weights.names == list(base)
    assert [v.shape for v in defense.attack_source.vectors[-1]] == [
        base[name].shape for name in base
    ]

    export_model(defense.model, defense.tokenizer, tmp_path / "model")
    exported = load(tmp_path / "model").state_dict()
    assert exported.keys() == base.keys()


@pytest.mark.parametrize("defended", [None, LORA], ids=["full-model", "lora-model"])
@pytest.mark.parametrize("attacked", [None, LORA], ids=["full-attack", "lora-attack"])
def test_tied_weights_stay_tied(gpt2, rows, defended, attacked):
    defense = run(gpt2, rows, defended=defended, attacked=attacked)
    model = defense.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is head
    assert not any("lm_head" in name for name in defense.all_weights.names)
    assert len(set(defense.all_weights.names)) == len(defense.attack_source.vectors[-1])
    before = snapshot(model)
    with defense.all_weights.shifted(defense.attack_source.vectors[-1]):
        assert head is model.get_output_embeddings().weight
        if attacked is None:
            assert not torch.equal(head, before[next(n for n in before if "lm_head" in n)])
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
