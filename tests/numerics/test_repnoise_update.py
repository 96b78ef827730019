"""If these fail, RepNoise does not compute what its paper says.

Its three terms are written down once more for a Llama, layer by layer and pair by pair.
"""

import copy

import pytest
import torch
from torch import Tensor

from patcher_pl.defenses import RepNoise
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Batch
from tests.numerics import plain
from tests.tiny_runs import SEED, Rows, fit, make_llama_exact, sgd

NUM_STEPS, LR, ALPHA, BETA = 3, 0.1, 0.6, 0.4


def mmd(xs: Tensor, ys: Tensor) -> Tensor:
    """Five Gaussian kernels, of widths around the mean distance between two different rows."""
    rows = [*xs, *ys]
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    width = torch.stack(pairs).mean().detach()

    def k(a: Tensor, b: Tensor) -> Tensor:
        terms = [torch.exp(-((a - b) ** 2).sum() / (width * f)) for f in (0.25, 0.5, 1, 2, 4)]
        return torch.stack(terms).sum()

    def mean(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([k(a, b) for a in one for b in other]).mean()

    return mean(xs, xs) + mean(ys, ys) - 2 * mean(xs, ys)


def harmful_terms(model, batch: Batch, position: int) -> Tensor:
    """beta mean MMD(h_l, N(0, I)) - alpha log(1 + mean CE_l)."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = whole.model
    generator = torch.Generator().manual_seed(derive_seed(SEED, "noise", position))
    answers = (batch["labels"] != -100)[..., None]
    h = inner.embed_tokens(batch["input_ids"])
    rotary = inner.rotary_emb(h, torch.arange(h.shape[1])[None])
    noises, losses = [], []
    for layer in inner.layers:
        e = layer.self_attn(
            layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None
        )
        h = h + e[0]
        m = layer.mlp(layer.post_attention_layernorm(h))
        h = h + m
        noise = torch.randn(m.shape, generator=generator, dtype=m.dtype)
        noises.append(mmd((m * answers).flatten(1), (noise * answers).flatten(1)))
        losses.append(plain.cross_entropy(whole.lm_head(inner.norm(h)), batch))
    ascent = torch.log(1 + torch.stack(losses).mean())
    return BETA * torch.stack(noises).mean() - ALPHA * ascent


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("limit", "num_micro_batches"), [(None, 1), (0.05, 2)])
def test_the_update_is_that_of_the_paper(
    llama, rows: Rows, monkeypatch, limit, num_micro_batches, lora
):
    make_llama_exact(monkeypatch)
    defense = RepNoise(
        LanguageModel(path=str(llama), dtype="float64", lora=lora),
        optimizer=sgd(LR),
        alpha=ALPHA,
        beta=BETA,
        max_grad_norm=limit,
        accumulate_grad_batches=num_micro_batches,
    )
    defense.configure_model()
    start = copy.deepcopy(defense.model).train()
    fit(defense, rows.module(), NUM_STEPS)

    safe = rows.batches("safe", defense.tokenizer)
    harmful = rows.stream("attack", defense.tokenizer)
    batches, expected, norms = harmful.endless(), start, []
    for _ in range(NUM_STEPS):
        terms = []
        for _ in range(num_micro_batches):
            x, y = next(safe), next(batches)
            place = harmful.position
            terms.append(plain.gradient(expected, x))
            terms.append(plain.gradient(expected, y, lambda m, b, p=place: harmful_terms(m, b, p)))
        total = plain.scaled(plain.plus(*terms), 1 / num_micro_batches)
        expected = plain.descended(expected, total, LR, limit, norms)
    assert limit is None or min(norms) > limit, "clipping must be active, or it is not tested"
    assert plain.relative_error(defense.model, expected, start) < 1e-9
    assert defense.cost.gradient_evaluations == 2 * NUM_STEPS * num_micro_batches
