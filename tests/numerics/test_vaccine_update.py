"""If these fail, Vaccine or T-Vaccine does not compute what its paper says.

The equations are written down once more for a Llama, layer by layer and without hooks.
"""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from patcher_pl.defenses import TVaccine, Vaccine
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch
from tests.numerics import plain
from tests.tiny_runs import SEED, Rows, fit, load, make_llama_exact, sgd

NUM_STEPS, LR, RHO = 6, 0.1, 0.7


def loss_under(model, batch: Batch, epsilon: Sequence[Tensor | float]) -> Tensor:
    """L(w; e_l + eps_l): a Llama's layers one after another, e_l the output of its attention."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = whole.model
    h = inner.embed_tokens(batch["input_ids"])
    places = torch.arange(h.shape[1])[None]
    rotary = inner.rotary_emb(h, places)
    for layer, eps in zip(inner.layers, epsilon, strict=True):
        e = layer.self_attn(
            layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None
        )[0]
        h = h + (e + eps)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return plain.cross_entropy(whole.lm_head(inner.norm(h)), batch)


def by_embeddings(model, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
    """g_l of some layers."""
    width = model.config.hidden_size
    zeros = [torch.zeros(*batch["input_ids"].shape, width).double() for _ in range(2)]
    for zero in zeros:
        zero.requires_grad_()
    gradients = torch.autograd.grad(loss_under(model, batch, zeros), zeros)
    return [gradients[layer] for layer in layers]


def vaccinated(model, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
    """Gradient of L(w; e + rho g / ||g||) by what is trained."""
    g = by_embeddings(model, batch, layers)
    norm = sum(float((part * part).sum()) for part in g) ** 0.5
    epsilon: list[Tensor | float] = [0.0, 0.0]
    for layer, part in zip(layers, g, strict=True):
        epsilon[layer] = RHO * part / norm
    return plain.gradient(model, batch, lambda m, b: loss_under(m, b, epsilon))


def frozen(model: nn.Module, vector: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """The vector with zeros for layers that were not drawn."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    others = [f"layers.{layer}." for layer in range(2) if layer not in layers]
    return [
        part * (not any(other in name for other in others))
        for name, part in zip(trained, vector, strict=True)
    ]


def start_of(defense) -> nn.Module:
    defense.configure_model()
    return copy.deepcopy(defense.model).train()


LORAS = pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
SETTINGS = pytest.mark.parametrize(("limit", "num_micro_batches"), [(None, 1), (0.05, 2)])


def options_of(limit, num_micro_batches):
    return {
        "optimizer": sgd(LR),
        "rho": RHO,
        "max_grad_norm": limit,
        "accumulate_grad_batches": num_micro_batches,
    }


@LORAS
@SETTINGS
def test_vaccine_takes_the_steps_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, lora
):
    make_llama_exact(monkeypatch)
    model = LanguageModel(path=str(llama), dtype="float64", lora=lora)
    defense = Vaccine(model, **options_of(limit, num_micro_batches))
    start = start_of(defense)
    fit(defense, rows.module(["safe"]), NUM_STEPS)

    safe, expected, norms = rows.batches("safe", defense.tokenizer), start, []
    for _ in range(NUM_STEPS):
        terms = [vaccinated(expected, next(safe), [0, 1]) for _ in range(num_micro_batches)]
        total = plain.scaled(plain.plus(*terms), 1 / num_micro_batches)
        expected = plain.descended(expected, total, LR, limit, norms)
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    assert defense.cost.gradient_evaluations == 2 * NUM_STEPS * num_micro_batches


@LORAS
@SETTINGS
def test_t_vaccine_takes_the_steps_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, lora
):
    make_llama_exact(monkeypatch)
    model = LanguageModel(path=str(llama), dtype="float64", lora=lora)
    defense = TVaccine(
        model,
        num_layers=1,
        resample_every=1,
        measure_every=2,
        **options_of(limit, num_micro_batches),
    )
    start = start_of(defense)
    fit(defense, rows.module(), NUM_STEPS)

    tokenizer = defense.tokenizer
    safe, harmful = rows.batches("safe", tokenizer), rows.batches("attack", tokenizer)
    expected, norms, drawn, p = start, [], [], torch.zeros(2)
    for step in range(NUM_STEPS):
        if step % 2 == 0:
            pulls = by_embeddings(expected, next(harmful), [0, 1])
            p = torch.stack([(pull * pull).sum().sqrt() for pull in pulls])
            p = p / p.sum()
        generator = torch.Generator().manual_seed(derive_seed(SEED, "layers", step))
        layers = torch.multinomial(p, 1, generator=generator).tolist()
        drawn += layers
        terms = [vaccinated(expected, next(safe), layers) for _ in range(num_micro_batches)]
        total = frozen(expected, plain.scaled(plain.plus(*terms), 1 / num_micro_batches), layers)
        expected = plain.descended(expected, total, LR, limit, norms)
    assert set(drawn) == {0, 1}, "both layers must have been drawn, or freezing is not tested"
    assert defense.probabilities == pytest.approx(p.tolist(), rel=1e-9)
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    assert defense.cost.gradient_evaluations == 2 * NUM_STEPS * num_micro_batches + NUM_STEPS // 2


def test_the_layer_by_layer_loss_is_that_of_the_model(llama, rows: Rows, monkeypatch):
    """Or the reference above would be of another model."""
    make_llama_exact(monkeypatch)
    model = load(llama, dtype="float64")
    batch = next(rows.batches("safe", LanguageModel(path=str(llama)).load_tokenizer()))
    assert loss_under(model, batch, [0.0, 0.0]).item() == pytest.approx(
        plain.loss_of(model, batch).item(), rel=1e-12
    )
