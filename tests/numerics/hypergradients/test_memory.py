"""If these fail, long attacks or deep models need memory that the exact hypergradient should save."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.hypergradients import Adjoint, Unrolled
from patcher_pl.hypergradients.hvp import ReverseOverForward, ReverseOverReverse
from patcher_pl.hypergradients.trajectories import (
    FullState,
    GradientLog,
    Revolve,
    SqrtCheckpoint,
)
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import Weights
from tests.numerics.hypergradients.live_memory import peak_bytes
from tests.numerics.hypergradients.problems import (
    OPTIMIZERS,
    Quadratic,
    attack,
    distance_to_origin,
    make_llama,
    outer_loss,
    quadratic_attack,
)

ON_DISK = [
    FullState(device="disk"),
    GradientLog(device="disk"),
    SqrtCheckpoint(device="disk"),
    Revolve(device="disk", num_checkpoints=4),
]


def test_the_measurement_itself():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: [(x + 1).sum() for _ in range(9)]) == 4000 + 9 * 4
    assert peak_bytes(lambda: [x + 1 for _ in range(5)]) == 20000
    assert peak_bytes(lambda: x.view(10, 100).add_(1)) == 0
    leaf = x.clone().requires_grad_()
    assert peak_bytes(lambda: (leaf.exp() * 2).sum().backward()) >= 8000


def peak_of(store, num_steps):
    """Peak in vectors of the size of the weights, of which a product takes few."""
    model = Quadratic(size=256)
    weights, inner = Weights(model), quadratic_attack(model, OPTIMIZERS["adamw"], num_steps)
    estimator = Adjoint(hvp=ReverseOverReverse(), store=store)
    peak = peak_bytes(lambda: estimator.estimate(model, weights, inner, distance_to_origin))
    return peak / model.w.nbytes


@pytest.mark.parametrize("store", ON_DISK, ids=lambda store: type(store).__name__)
def test_on_disk_memory_does_not_grow_with_the_attack(store):
    assert peak_of(store, 24) <= peak_of(store, 4) + 0.1


@pytest.mark.parametrize(
    ("store", "least", "most"),
    [
        # In vectors: what 24 steps keep more than 4 steps.
        (FullState(), 4 * 20, 4 * 20),
        (GradientLog(), 20, 20 + 6 * 3),
        (SqrtCheckpoint(), 6 * 3 - 1, 7 * 3),
        (SqrtCheckpoint(device="cpu"), 6 * 3 - 1, 7 * 3),
        (Revolve(num_checkpoints=4), 0, 3),
    ],
    ids=str,
)
def test_beside_the_model_memory_grows_as_documented(store, least, most):
    assert least - 0.1 <= peak_of(store, 24) - peak_of(store, 4) <= most + 0.1


def test_the_whole_graph_grows_by_activations():
    """What all this is about: many times what a log of the gradients takes."""
    peaks = []
    for num_steps in (1, 3):
        model = make_llama(torch.float32)
        weights, inner = Weights(model), attack(OPTIMIZERS["adamw"], num_steps)
        peaks.append(peak_bytes(lambda: Unrolled().estimate(model, weights, inner, outer_loss)))  # noqa: B023
    assert (peaks[1] - peaks[0]) / 2 > 4 * sum(p.nbytes for p in weights.parameters)


def product_and_gradient(hvp, sizes, batch_shape):
    """Peaks of a product and of a gradient with checkpointing.

    Args:
        hvp: How the product is computed.
        sizes: Vocabulary, hidden size, size of the MLP, layers and heads.
        batch_shape: Rows and tokens.
    """
    vocabulary, hidden, intermediate, layers, heads = sizes
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=batch_shape[1],
    )
    model = LlamaForCausalLM(config).train()
    parameters = list(model.parameters())
    ids = torch.randint(0, vocabulary, batch_shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss():
        return differentiable_loss(model, batch)

    gradients = torch.autograd.grad(loss(), parameters)
    vector = [torch.randn_like(parameter) for parameter in parameters]
    product = peak_bytes(lambda: hvp.product(model, parameters, loss, vector, gradients))
    model.activation_checkpointing_enable()
    return product, peak_bytes(lambda: torch.autograd.grad(loss(), parameters))


def test_a_rematerialized_product_needs_at_most_two_checkpointed_gradients():
    """Of 10 M parameters and 512 tokens; products that keep activations need far more."""
    sizes, batch_shape = (512, 320, 864, 8, 5), (8, 64)
    economical, default = ReverseOverForward(rematerialize=True), ReverseOverForward()
    product, gradient = product_and_gradient(economical, sizes, batch_shape)
    assert product <= 2 * gradient
    kept, _ = product_and_gradient(default, sizes, batch_shape)
    assert kept > 5 * gradient


def test_a_rematerialized_product_keeps_the_activations_of_one_block():
    """A further block adds its weights and its input, twice what it adds to a gradient."""
    added = []
    for hvp in (ReverseOverForward(rematerialize=True), ReverseOverForward()):
        short, long = (product_and_gradient(hvp, (64, 32, 88, n, 2), (8, 32)) for n in (4, 10))
        added.append([after - before for before, after in zip(short, long, strict=True)])
    (rematerialized, gradient), (kept, _) = added
    assert rematerialized < 2.5 * gradient
    assert kept > 25 * gradient


def test_products_follow_the_checkpointing_of_the_model():
    """Wrong if a model that is checkpointed to fit did not fit any more."""
    model, hvp = make_llama(torch.float32), ReverseOverForward()
    cost = hvp.gradient_evaluations(model)
    model.activation_checkpointing_enable()
    assert hvp.gradient_evaluations(model) > cost
    assert ReverseOverForward(rematerialize=False).gradient_evaluations(model) == cost
