"""What runs of every defense must leave as it was, and may depend on."""

import random
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.models import Lora
from tests.defense_table import build
from tests.tiny_runs import Rows, assert_same, fit, make_llama_exact, snapshot

NUM_STEPS = 5
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout-accumulated": ("gpt2", {"accumulate_grad_batches": 2}),
    "adapters": ("llama", {"model": {"lora": Lora(rank=2, dropout=0.1)}}),
}


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SaveAll(Callback):
    """Writes a checkpoint after each of some steps, into a folder."""

    def __init__(self, folder, steps) -> None:
        self.paths = {step: folder / f"{step}.ckpt" for step in steps}

    def on_train_batch_end(self, trainer, pl_module, *_):
        path = self.paths.get(trainer.global_step)
        if path is not None and pl_module.is_between_steps:
            trainer.save_checkpoint(path)


def assert_equal(first: Any, second: Any) -> None:
    """Every number and tensor of two nested structures agrees to the last bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_equal(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for ours, theirs in zip(first, second, strict=True):
            assert_equal(ours, theirs)
    else:
        assert first == second


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, variant, rows, tmp_path, request):
    """In all that a checkpoint holds: weights, optimizer, schedule, cost, random state, places in
    both data sets, and what the defense keeps. In the middle of a round of its own, and at its end.
    """
    family, options = VARIANTS[variant]
    make = partial(build, kind, request.getfixturevalue(family), scheduler=decaying, **options)

    def run(name: str, seed: int, save_after, max_steps=NUM_STEPS, **trainer):
        seed_all(seed)
        save = SaveAll(tmp_path / name, save_after)
        # A resumed run has the seed of its data from the checkpoint.
        data = rows.module(seed=7 if seed == 1 else 5)
        fit(make(), data, max_steps, callbacks=[save], **trainer)
        return save.paths

    whole = run("whole", 1, [NUM_STEPS])
    interrupted = run("interrupted", 1, [3, 4], max_steps=4)
    runs = [whole] + [
        run(f"resumed-{step}", 99, [NUM_STEPS], ckpt_path=path, weights_only=True)
        for step, path in interrupted.items()
    ]
    ends = [torch.load(paths[NUM_STEPS], weights_only=True) for paths in runs]
    for end in ends:
        for state in end["defense"]["random_states"]:
            del state["python"]  # Writing a checkpoint draws from it.
    for end in ends[1:]:
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "defense", "global_step"):
            assert_equal(end[part], ends[0][part])
        assert_equal(end["SafetyDataModule"], ends[0]["SafetyDataModule"])


def test_a_seed_decides_a_run(kind, gpt2, rows):
    """With dropout, and whether or not there is validation in between."""
    ends = []
    for seed, parts in ((1, ()), (1, ("val",)), (2, ())):
        torch.manual_seed(seed)
        defense = build(kind, gpt2)
        data = rows.module(["safe", "attack", *parts])
        fit(defense, data, 4, num_sanity_val_steps=1, val_check_interval=2)
        ends.append(snapshot(defense.model))
    assert_same(ends[0], ends[1])
    assert any(not torch.equal(value, ends[2][name]) for name, value in ends[0].items())


def traces(model) -> list[Any]:
    """All of a model that a step could leave changed, weights aside."""
    return [
        (name, type(m), m.training, hooks(m), m.forward) for name, m in model.named_modules()
    ] + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def hooks(module) -> list[Any]:
    """Without those that transformers leaves where hidden states were asked for once."""
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in found if not hook.__module__.startswith("transformers.")]


class SpillingError(RuntimeError):
    """What a defense cannot have expected."""


class Spill(Callback):
    """Raises at one pass of the first step: where the output head is reached, or on the way back.

    Args:
        at: Which of these events (count, from 0).
        patch: Puts the calls in that raise.
    """

    def __init__(self, at: int, patch: pytest.MonkeyPatch) -> None:
        self._at, self._is_on, self._events = at, False, count()
        for name in ("backward", "grad"):
            patch.setattr(torch.autograd, name, self._spilling(getattr(torch.autograd, name)))

    def _spilling(self, real):
        def spilling(*args, **kwargs):
            self._look()
            return real(*args, **kwargs)

        return spilling

    def _look(self, *_) -> None:
        if self._is_on and next(self._events) == self._at:
            raise SpillingError

    def on_train_start(self, trainer, pl_module):
        head = pl_module.model.get_output_embeddings()
        head.register_forward_pre_hook(self._look)
        self.traces = traces(pl_module.model)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._is_on = True
        self.weights = snapshot(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert traces(pl_module.model) == self.traces


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["every-weight", "adapters"])
def test_what_raises_midway_leaves_the_model_alone(make, claims, lora, rows):
    """As after Ctrl-C, when a checkpoint is written next: at every pass there is in a step."""
    for at in count():
        defense = make(model={"lora": lora})
        with pytest.MonkeyPatch.context() as patch:
            spill = Spill(at, patch)
            try:
                fit(defense, rows.module(), 1, callbacks=[spill])
            except SpillingError:
                assert traces(defense.model) == spill.traces
                assert_same(snapshot(defense.model), spill.weights)
            else:
                break
    assert at >= 2 * claims.evaluations[0]


class Gradients(torch.optim.SGD):
    """Takes no step, and keeps the gradients of every one."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.0)
        self.kept = []

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        self.kept.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


@pytest.fixture
def even(tmp_path):
    """Rows of one length: the mean of means over batches is the mean over tokens then."""
    return Rows(tmp_path / "even", num_safe=8, even=True)


def largest_difference(first, second) -> float:
    pairs = zip(first, second, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def test_accumulated_batches_are_one_large_batch(make, claims, even, monkeypatch):
    """Where the defense says so. Clipped, since to clip every batch would be a typical mistake."""
    make_llama_exact(monkeypatch)

    def trained(num_batches):
        defense = make(
            model={"dtype": "float64"},
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            accumulate_grad_batches=num_batches,
            max_grad_norm=0.2,
        )
        # Attacks come once a step, harmful batches with every batch.
        size = 2 if claims.per_batch is None else 4 // num_batches
        data = even.module(
            batch_size=4 // num_batches, attack_batch_size=size, group_by_length=False
        )
        fit(defense, data, 4)
        return [parameter.detach() for parameter in defense.model.parameters()]

    large = trained(1)
    if claims.per_batch is not None:
        difference = largest_difference(trained(2), large)
        assert difference > 1e-6, "accumulation is exact, against the table"
        return
    for num_batches in (2, 4):
        assert largest_difference(trained(num_batches), large) < 1e-12


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(
    make, claims, even, monkeypatch
):
    """Wrong if a term of the loss were counted once per step, or once per batch in full."""
    if claims.per_batch is None:
        pytest.skip("follows from the test above")
    make_llama_exact(monkeypatch)
    kept = []
    for num_batches in (1, 2):
        defense = make(
            model={"dtype": "float64"},
            optimizer=Gradients,
            accumulate_grad_batches=num_batches,
            max_grad_norm=None,
        )
        trainer = fit(defense, even.module(), 2 // num_batches)
        kept.append(trainer.optimizers[0].kept)
    (first, second), (accumulated,) = kept
    mean = [(one + other) / 2 for one, other in zip(first, second, strict=True)]
    assert largest_difference(first, second) > 1e-3
    assert largest_difference(accumulated, mean) < 1e-12
