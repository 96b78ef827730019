"""If these fail, Patcher does not compute what its paper says.

The three lines of the paper are written down once more, in plain PyTorch on copies of the model and
with cross-entropy, clipping and AdamW by hand, and must lead to the same weights in float64.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.types import Batch
from tests.tiny_runs import Rows, adamw, fit, load, make_llama_exact

NUM_ROUNDS = 3
K1 = 3
K2 = 4
CLIP = 0.3


class PlainAdamW:
    """Loshchilov and Hutter's algorithm 2, with torch's constants."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        self.theta = list(model.parameters())
        self.lr, self.weight_decay = lr, weight_decay
        self.m = [torch.zeros_like(p) for p in self.theta]
        self.v = [torch.zeros_like(p) for p in self.theta]
        self.t = 0

    @torch.no_grad()
    def step(self, gradient: list[Tensor]) -> None:
        self.t += 1
        for p, g, m, v in zip(self.theta, gradient, self.m, self.v, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            p.copy_(p - self.lr * (m_hat / (v_hat.sqrt() + 1e-8) + self.weight_decay * p))


def gradient_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Gradient of the mean negative log-likelihood of the answer tokens."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    likelihoods = output.logits.log_softmax(-1)
    terms = [
        -likelihoods[row, time - 1, batch["labels"][row, time]]
        for row, time in (batch["labels"] != -100).nonzero().tolist()
    ]
    return list(torch.autograd.grad(torch.stack(terms).mean(), list(model.parameters())))


def clipped(gradient: list[Tensor], norms: list[float]) -> list[Tensor]:
    norm = float(sum((g * g).sum() for g in gradient)) ** 0.5
    norms.append(norm)
    return [g * min(1.0, CLIP / (norm + 1e-6)) for g in gradient]


def moved(model: nn.Module, vector: list[Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, change in zip(copied.parameters(), vector, strict=True):
            parameter.copy_(parameter + change)
    return copied


def train_by_the_paper(
    model: nn.Module,
    safe: Iterator[Batch],
    unsafe: Iterator[Batch],
    *,
    alpha: float,
    restart_optimizer: bool,
    num_micro_batches: int,
) -> list[float]:
    """Trains `model`; returns the gradient norms before clipping."""
    norms: list[float] = []
    defender = PlainAdamW(model, lr=1e-3, weight_decay=0.1)
    v = None
    for m in range(NUM_ROUNDS):
        if m > 0:
            attacked = copy.deepcopy(model)
            attacker = PlainAdamW(attacked, lr=2e-3, weight_decay=0.05)
            for _ in range(K1):
                attacker.step(clipped(gradient_of(attacked, next(unsafe)), norms))
            v = [
                (after - before).detach()
                for after, before in zip(attacked.parameters(), model.parameters(), strict=True)
            ]
            if restart_optimizer:
                defender = PlainAdamW(model, lr=1e-3, weight_decay=0.1)
        for _ in range(K2):
            total = [torch.zeros_like(p) for p in model.parameters()]
            for batch in [next(safe) for _ in range(num_micro_batches)]:
                terms = [(1.0 if v is None else 1 - alpha, gradient_of(model, batch))]
                if v is not None:
                    terms.append((alpha, gradient_of(moved(model, v), batch)))
                for weight, gradient in terms:
                    for sum_, g in zip(total, gradient, strict=True):
                        sum_ += weight * g / num_micro_batches
            defender.step(clipped(total, norms))
    return norms


@pytest.mark.parametrize(
    ("alpha", "restart_optimizer", "num_micro_batches"),
    [(0.5, False, 1), (0.3, True, 1), (0.8, False, 2), (1.0, True, 2)],
)
def test_the_update_is_that_of_the_paper(
    llama, rows: Rows, monkeypatch, alpha, restart_optimizer, num_micro_batches
):
    make_llama_exact(monkeypatch)
    expected = load(llama, dtype="float64").train()
    start = copy.deepcopy(expected)
    defense = Patcher(
        LanguageModel(path=str(llama), dtype="float64"),
        FineTuningAttacker(
            num_steps=K1, optimizer=AdamW(lr=2e-3, weight_decay=0.05), max_grad_norm=CLIP
        ),
        optimizer=adamw(1e-3),
        alpha=alpha,
        refresh_every=K2,
        restart_optimizer=restart_optimizer,
        max_grad_norm=CLIP,
        accumulate_grad_batches=num_micro_batches,
    )
    fit(defense, rows.module(), NUM_ROUNDS * K2)

    tokenizer = defense.tokenizer
    norms = train_by_the_paper(
        expected,
        rows.batches("safe", tokenizer),
        rows.batches("attack", tokenizer),
        alpha=alpha,
        restart_optimizer=restart_optimizer,
        num_micro_batches=num_micro_batches,
    )
    assert min(norms) > CLIP, "clipping must be active, or it is not tested"
    pairs = zip(defense.model.parameters(), expected.parameters(), strict=True)
    error = max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)
    change = max(
        float((after - before).detach().abs().max())
        for after, before in zip(expected.parameters(), start.parameters(), strict=True)
    )
    assert error < 1e-10
    assert change > 1e-3
