"""What a Lightning user may expect of every defense; a new one must be added to the table."""

import math

import pytest
import torch

from patcher_pl import defenses
from patcher_pl.defenses import Defense
from tests.defense_table import TABLE
from tests.tiny_runs import MemoryLogger, Rows, fit, load, snapshot


def subclasses(parent: type[Defense]) -> set[type[Defense]]:
    found = set(parent.__subclasses__())
    return found.union(*map(subclasses, found))


def test_the_table_is_complete():
    public = {getattr(defenses, name) for name in defenses.__all__} - {Defense}
    shipped = {one for one in subclasses(Defense) if one.__module__.startswith("patcher_pl.")}
    assert public == shipped == set(TABLE)


def test_three_steps(make, llama, rows: Rows):
    start = load(llama).state_dict()
    defense, logger = make(), MemoryLogger()
    trainer = fit(defense, rows.module(), 3, logger=logger)
    assert trainer.global_step == 3
    for metric in ("train/loss_safe", "train/grad_norm", "train/lr"):
        assert sorted(logger.history[metric]) == [1, 2, 3]
        assert all(math.isfinite(value) for value in logger.history[metric].values())
    assert math.isfinite(trainer.callback_metrics["train/loss_safe"])
    assert defense.model.training
    trained = snapshot(defense.model)
    assert all(bool(value.isfinite().all()) for value in trained.values())
    assert any(not torch.equal(value, trained[name]) for name, value in start.items())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_max_steps_counts_defender_steps_across_epochs(make, rows, accumulate):
    """An epoch has 4 batches, so that with 3 batches to a step, steps span epochs."""
    defense, data = make(accumulate_grad_batches=accumulate), rows.module()
    trainer = fit(defense, data, 5)
    assert trainer.global_step == 5
    assert data.train_dataloader().position == 5 * accumulate
    assert defense.is_between_steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_advances_once_per_defender_step(make, rows, accumulate):
    used = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    logger = MemoryLogger()
    defense = make(
        optimizer=lambda parameters: Recording(parameters, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        accumulate_grad_batches=accumulate,
        max_grad_norm=1e-3,
    )
    fit(defense, rows.module(), 4, logger=logger)
    assert used == [1.0, 0.5, 0.25, 0.125]
    assert list(logger.history["train/lr"].values()) == used


def test_gradients_are_clipped(make, llama, rows):
    """With gradient descent, the length of a step is lr times the clipped norm."""
    lengths = {}
    for limit in (None, 0.05):
        logger = MemoryLogger()
        defense = make(
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), max_grad_norm=limit
        )
        fit(defense, rows.module(), 1, logger=logger)
        start = load(llama).state_dict()
        moved = [value - start[name] for name, value in snapshot(defense.model).items()]
        lengths[limit] = float(torch.nn.utils.get_total_norm(moved))
        norm = logger.history["train/grad_norm"][1]
        assert norm > 0.05, "the logged norm is that before clipping"
    assert lengths[None] == pytest.approx(0.1 * norm, rel=1e-3)
    assert lengths[0.05] == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_everything_is_logged_at_defender_steps(make, rows):
    """Also with accumulation, and validation in between, where Lightning itself counts batches."""
    logger = MemoryLogger()
    defense = make(accumulate_grad_batches=3)
    fit(
        defense,
        rows.module(["safe", "attack", "val"]),
        6,
        logger=logger,
        log_every_n_steps=2,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    assert sorted(logger.history["train/loss_safe"]) == [2, 4, 6]
    assert sorted(logger.history["val/loss"]) == [1, 2, 3, 4, 5, 6]


def test_the_logged_loss_is_the_mean_of_what_is_accumulated(make, rows):
    """At lr 0, so that the losses of single batches are the same in both runs."""
    losses = []
    for accumulate in (1, 3):
        logger = MemoryLogger()
        defense = make(
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            accumulate_grad_batches=accumulate,
        )
        fit(defense, rows.module(), 6 // accumulate, logger=logger)
        losses.append(list(logger.history["train/loss_safe"].values()))
    single, accumulated = losses
    assert accumulated == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(make, rows, precision):
    trainer = fit(make(), rows.module(), 3, precision=precision)
    assert math.isfinite(trainer.callback_metrics["train/loss_safe"])


def test_training_again_begins_without_old_gradients(make, rows):
    """As in a notebook, after a run that broke off in the middle of a step."""
    broken = make(accumulate_grad_batches=2)
    fit(broken, rows.module(), -1, max_epochs=1, limit_train_batches=1)
    assert not broken.is_between_steps
    fresh = make(accumulate_grad_batches=2)
    for defense in (broken, fresh):
        fit(defense, rows.module(), 1)
    ours, theirs = snapshot(broken.model), snapshot(fresh.model)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("max_grad_norm", 0.0, "Use null"),
        ("max_grad_norm", -1.0, "Use null"),
        ("accumulate_grad_batches", 0, "Use 1"),
    ],
)
def test_bad_settings_are_refused(make, field, value, remedy):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}. {remedy}") as caught:
        make(**{field: value})
    assert str(caught.value).startswith(f"{type(make()).__name__}.")
