"""What every defense must say of its cost; wrong if runs of equal cost were unequal."""

from bisect import bisect_left
from itertools import accumulate, count, pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.callbacks import ComputeBudget, CostMonitor, cost_monitor
from tests.tiny_runs import MemoryLogger, SaveAt, fit


class Counted(Callback):
    """Counts by itself, from torch's side, and keeps its counts beside the defense's at every step.

    Args:
        patch: Puts the counting calls in.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_backward_passes = self.num_tokens = 0
        self.counted, self.claimed = [], []
        for name in ("backward", "grad"):
            patch.setattr(torch.autograd, name, self._counting(getattr(torch.autograd, name)))

    def _counting(self, real):
        def counting(*args, **kwargs):
            self.num_backward_passes += 1
            return real(*args, **kwargs)

        return counting

    def _count_tokens(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():
            self.num_tokens += int(kwargs["attention_mask"].sum())

    def on_train_start(self, trainer, pl_module):
        pl_module.model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.is_between_steps:
            self.counted.append((self.num_backward_passes, self.num_tokens))
            self.claimed.append((pl_module.cost.gradient_evaluations, pl_module.cost.tokens))


@pytest.mark.parametrize("num_batches", [1, 2])
def test_every_pass_is_counted(make, claims, rows, monkeypatch, num_batches):
    counted = Counted(monkeypatch)
    fit(make(accumulate_grad_batches=num_batches), rows.module(), 4, callbacks=[counted])
    assert counted.claimed == counted.counted
    if num_batches == 1:
        assert [spent for spent, _ in counted.claimed] == list(accumulate(claims.evaluations))


def test_cost_is_logged(make, claims, rows, monkeypatch):
    """At every second step, by a clock that takes one second between two looks."""
    monkeypatch.setattr(cost_monitor, "time", SimpleNamespace(monotonic=count().__next__))
    logger, counted = MemoryLogger(), Counted(monkeypatch)
    fit(
        make(),
        rows.module(),
        4,
        logger=logger,
        callbacks=[counted, CostMonitor()],
        log_every_n_steps=2,
    )
    spent = list(accumulate(claims.evaluations))
    assert logger.history["cost/gradient_evaluations"] == {2: spent[1], 4: spent[3]}
    tokens = [0, *(tokens for _, tokens in counted.counted)]
    per_second = logger.history["cost/tokens_per_second"]
    assert per_second == {2: tokens[2], 4: tokens[4] - tokens[2]}
    assert all(earlier < later for earlier, later in pairwise(tokens))
    assert all(value > 0 for value in logger.history["cost/peak_memory_gib"].values())


@pytest.mark.parametrize("over", [0, 1])
def test_a_budget_is_exceeded_by_less_than_a_step(make, claims, rows, tmp_path, over):
    """A budget that two steps spend to the last pass, or that takes another step."""
    spent = list(accumulate(claims.evaluations))
    budget = spent[1] + over
    defense = make()
    save = SaveAt(bisect_left(spent, budget) + 1, tmp_path / "end.ckpt")
    trainer = fit(defense, rows.module(), 4, callbacks=[save, ComputeBudget(budget)])
    assert trainer.global_step == save.step == 2 + over
    assert defense.cost.gradient_evaluations == spent[1 + over]
    resumed = make()
    options = {"ckpt_path": save.path, "weights_only": True}
    trainer = fit(resumed, rows.module(), 4, callbacks=[ComputeBudget(budget)], **options)
    assert trainer.global_step == 2 + over, "a run that has spent its budget took another step"
    assert resumed.cost == defense.cost


def test_a_budget_ends_no_step_half_way(make, rows):
    defense = make(accumulate_grad_batches=3)
    trainer = fit(defense, rows.module(), 4, callbacks=[ComputeBudget(1)])
    assert trainer.global_step == 1
    assert defense.is_between_steps
