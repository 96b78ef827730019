"""If these fail, Patcher does not compute what its paper says.

The three lines of the paper are written down once more, in plain PyTorch on copies of the model and
with cross-entropy, clipping and AdamW by hand, and must lead to the same weights in float64.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from patcher_pl.attackers import Carry, FineTuningAttacker
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
    carry: Carry | None = None,
    num_rounds: int = NUM_ROUNDS,
) -> list[float]:
    """Trains `model`; returns the gradient norms before clipping."""
    norms: list[float] = []
    defender = PlainAdamW(model, lr=1e-3, weight_decay=0.1)
    v, moments = None, None
    for m in range(num_rounds):
        if m > 0:
            attacked = copy.deepcopy(model)
            # The first attack and every R-th after it begin at theta, the others beyond theta + v.
            goes_on = carry is not None and v is not None and (m - 1) % (carry.restart_every or m)
            if goes_on:
                attacked = moved(model, [carry.scale * change for change in v])
            attacker = PlainAdamW(attacked, lr=2e-3, weight_decay=0.05)
            if goes_on and carry.keep_optimizer:
                attacker.m, attacker.v, attacker.t = moments
            for _ in range(K1):
                attacker.step(clipped(gradient_of(attacked, next(unsafe)), norms))
            v = [
                (after - before).detach()
                for after, before in zip(attacked.parameters(), model.parameters(), strict=True)
            ]
            moments = attacker.m, attacker.v, attacker.t
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
    settings = {"alpha": alpha, "restart_optimizer": restart_optimizer}
    assert_trained_alike(llama, rows, monkeypatch, settings, num_micro_batches)


@pytest.mark.parametrize(
    "carry",
    [Carry(restart_every=3), Carry(restart_every=2, scale=1.5), Carry(keep_optimizer=True)],
    ids=["restarts", "stretched", "moments"],
)
def test_carried_attacks_are_those_of_their_equation(llama, rows, monkeypatch, carry):
    """v_n = A(theta_n + scale v_(n-1)) - theta_n, over five attacks."""
    settings = {"alpha": 0.5, "restart_optimizer": False}
    assert_trained_alike(llama, rows, monkeypatch, settings, 1, carry=carry, num_rounds=6)


def assert_trained_alike(
    llama, rows, monkeypatch, settings, num_micro_batches, *, carry=None, num_rounds=NUM_ROUNDS
) -> None:
    make_llama_exact(monkeypatch)
    expected = load(llama, dtype="float64").train()
    start = copy.deepcopy(expected)
    defense = Patcher(
        LanguageModel(path=str(llama), dtype="float64"),
        FineTuningAttacker(
            num_steps=K1,
            optimizer=AdamW(lr=2e-3, weight_decay=0.05),
            max_grad_norm=CLIP,
            carry=carry,
        ),
        optimizer=adamw(1e-3),
        refresh_every=K2,
        **settings,
        max_grad_norm=CLIP,
        accumulate_grad_batches=num_micro_batches,
    )
    fit(defense, rows.module(), num_rounds * K2)

    tokenizer = defense.tokenizer
    norms = train_by_the_paper(
        expected,
        rows.batches("safe", tokenizer),
        rows.batches("attack", tokenizer),
        num_micro_batches=num_micro_batches,
        carry=carry,
        num_rounds=num_rounds,
        **settings,
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
