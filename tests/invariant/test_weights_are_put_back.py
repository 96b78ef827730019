"""If these fail, an attack or a shift leaves traces in the model that the defender trains."""

import copy

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import SGD, AdamW
from patcher_pl.types import Batch
from tests.tiny_runs import BrokenAttacker, Rows, adamw, assert_same, load, snapshot

LORA = Lora(rank=2)
ATTACKERS = {
    "full": FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-2)),
    "lora": FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-2), lora=LORA),
    "broken": BrokenAttacker(),
}


class Traces:
    """A model in the middle of training, and everything of it that an attack could change."""

    def __init__(self, model, batch: Batch) -> None:
        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = adamw()(trained)
        differentiable_loss(model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        differentiable_loss(model, batch).backward()
        self.before = self._now()
        self.gradients = [parameter.grad for parameter in model.parameters()]

    def _now(self):
        parameters = list(self.model.parameters())
        return {
            "weights": snapshot(self.model),
            "gradients": [copy.deepcopy(p.grad) for p in parameters],
            "flags": [(name, p.requires_grad) for name, p in self.model.named_parameters()],
            "modules": [(name, type(m), m.training) for name, m in self.model.named_modules()],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def assert_none(self) -> None:
        now = self._now()
        assert_same(now["weights"], self.before["weights"])
        assert now["flags"] == self.before["flags"]
        assert now["modules"] == self.before["modules"]
        for ours, before in zip(now["gradients"], self.before["gradients"], strict=True):
            assert (ours is None) == (before is None)
            assert ours is None or torch.equal(ours, before)
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            assert parameter.grad is gradient
        states = zip(
            now["optimizer"]["state"].values(),
            self.before["optimizer"]["state"].values(),
            strict=True,
        )
        for state, before in states:
            assert_same(state, before)


def batches_for(rows: Rows, path):
    tokenizer = LanguageModel(path=str(path)).load_tokenizer()
    return rows.batches("safe", tokenizer), rows.batches("attack", tokenizer)


@pytest.mark.parametrize("attack", ATTACKERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("defended", [None, LORA], ids=["full-model", "lora-model"])
def test_an_attack_leaves_no_trace(llama, rows, attack, dtype, defended):
    safe, unsafe = batches_for(rows, llama)
    model = load(llama, dtype=dtype, lora=defended)
    traces = Traces(model, next(safe))
    attacker = ATTACKERS[attack]
    if attack == "broken":
        with pytest.raises(RuntimeError, match="out of potion"):
            attacker.attack(model, Weights(model), unsafe)
    else:
        outcome = attacker.attack(model, Weights(model), unsafe)
        assert max(float(change.abs().max()) for change in outcome.vector) > 1e-3
    traces.assert_none()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shift_is_undone_to_the_last_bit(llama, rows, dtype):
    """Adding and subtracting again would not do: it loses the low bits of the weights."""
    safe, unsafe = batches_for(rows, llama)
    model = load(llama, dtype=dtype)
    weights = Weights(model)
    vector = ATTACKERS["full"].attack(model, weights, unsafe).vector
    traces = Traces(model, next(safe))
    for _ in range(2):
        with weights.shifted(vector):
            assert not torch.equal(model.lm_head.weight, traces.before["weights"]["lm_head.weight"])
        traces.assert_none()
    with torch.no_grad():
        for parameter, change in zip(weights.parameters, vector, strict=True):
            parameter.add_(change).sub_(change)
    drifted = snapshot(model)
    assert any(not torch.equal(value, drifted[k]) for k, value in traces.before["weights"].items())


def test_a_shift_is_undone_when_the_block_raises(llama):
    model = load(llama)
    weights, before = Weights(model), snapshot(model)
    ones = [torch.ones_like(parameter) for parameter in weights.parameters]
    with pytest.raises(RuntimeError, match="spilled"), weights.shifted(ones):
        raise RuntimeError("spilled")
    assert_same(snapshot(model), before)
    with weights.shifted(ones):
        pass


def test_a_shift_copies_no_weight(llama):
    """On one device the parameters change places with their shifted copies, and back."""
    model = load(llama)
    weights = Weights(model)
    ones = [torch.ones_like(parameter) for parameter in weights.parameters]
    before = [parameter.data_ptr() for parameter in weights.parameters]
    used = []
    for _ in range(2):
        with weights.shifted(ones):
            used.append([parameter.data_ptr() for parameter in weights.parameters])
        assert [parameter.data_ptr() for parameter in weights.parameters] == before
    assert used[0] == used[1]
    assert not set(used[0]) & set(before)


@pytest.mark.parametrize("place", ["model", "host"])
def test_tied_weights_stay_tied(llama, place):
    model = load(llama)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    weights, before = Weights(model, place), snapshot(model)
    ones = [torch.ones_like(parameter) for parameter in weights.parameters]
    with weights.shifted(ones):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"] + 1)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_a_shift_between_forward_and_backward_is_noticed(llama, rows, inside):
    """The gradient would be that of one set of weights at another, without a sign."""
    safe, _ = batches_for(rows, llama)
    model, batch = load(llama), next(safe)
    weights = Weights(model)
    ones = [torch.ones_like(parameter) for parameter in weights.parameters]
    loss = differentiable_loss(model, batch)
    with weights.shifted(ones):
        if inside == "forward":
            loss = differentiable_loss(model, batch)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    if inside == "forward":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_shift_within_a_shift_is_refused(llama):
    model = load(llama)
    weights, before = Weights(model), snapshot(model)
    zeros = [torch.zeros_like(parameter) for parameter in weights.parameters]
    with (
        pytest.raises(RuntimeError, match=r"Weights\.shifted must not be entered twice"),
        weights.shifted(zeros),
        weights.shifted(zeros),
    ):
        pass
    assert_same(snapshot(model), before)


def test_shifting_again_sees_weights_that_were_trained_in_between(llama):
    """The space for saved weights is reused; old contents must not come back."""
    model = load(llama)
    weights = Weights(model)
    zeros = [torch.zeros_like(parameter) for parameter in weights.parameters]
    with weights.shifted(zeros):
        pass
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    trained = snapshot(model)
    with weights.shifted(zeros):
        pass
    assert_same(snapshot(model), trained)


def test_weights_are_found_again_after_the_model_was_moved(llama):
    """As when a run is resumed: its weights are looked up before the model goes to the GPU."""
    model = load(llama)
    weights = Weights(model)
    model.double()  # Gives the parameters other memory, as a move does.
    ones = [torch.ones_like(parameter) for parameter in weights.parameters]
    before = snapshot(model)
    with weights.shifted(ones):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"] + 1)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("place", ["model", "host"])
def test_copies_may_be_kept_elsewhere(llama, place):
    model = load(llama).to("meta")
    weights = Weights(model, place)
    expected = "meta" if place == "model" else "cpu"
    placed = weights.placed([torch.ones(1) for _ in weights.parameters])
    assert {tensor.device.type for tensor in placed} == {expected}


def autocast_forwards(cache: bool):
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache)


def test_attack_steps_take_effect_under_autocast(llama, rows):
    """Autocast keeps casts of weights; without clearing them, every step sees the first weights."""
    vectors = []
    for cache in (False, True):
        _, unsafe = batches_for(rows, llama)
        model = load(llama)
        attacker = FineTuningAttacker(num_steps=3, optimizer=SGD(lr=0.5), max_grad_norm=None)
        with autocast_forwards(cache):
            vectors.append(attacker.attack(model, Weights(model), unsafe).vector)
    for uncached, cached in zip(*vectors, strict=True):
        assert torch.equal(uncached, cached)


def test_shifts_take_effect_under_autocast(llama, rows):
    safe, _ = batches_for(rows, llama)
    batch = next(safe)
    model = load(llama)
    weights = Weights(model)
    vector = [0.5 * parameter.detach() for parameter in weights.parameters]
    losses = []
    for cache in (False, True):
        with autocast_forwards(cache):
            before = differentiable_loss(model, batch)
            with weights.shifted(vector):
                inside = differentiable_loss(model, batch)
            after = differentiable_loss(model, batch)
            losses.append((before.item(), inside.item(), after.item()))
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][2] != losses[0][1]
