"""If these fail, Booster, TAR or SEAM starts what cannot be right, or leaves traces in the model."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import loop
from patcher_pl.defenses import Booster, Seam, Tar
from patcher_pl.errors import RunInterrupted
from patcher_pl.models import LanguageModel, Lora, Weights
from tests.tiny_runs import MemoryLogger, SaveAt, adamw, assert_same, fit, load, snapshot

NUM_STEPS = 6


def make(defense, path, lora=None, **options):
    own = {}
    if defense is Tar:
        own = {"num_inner_steps": 3, "gradient_every": 2, "inner_lrs": [1e-3, 1e-2, 3e-2]}
    model = LanguageModel(path=str(path), lora=lora)
    return defense(model, **{"optimizer": adamw(), **own, **options})


@pytest.mark.parametrize(
    ("defense", "field", "value"),
    [
        (Booster, "lam", -1.0),
        (Booster, "alpha", 0.0),
        (Tar, "num_inner_steps", 0),
        (Tar, "gradient_every", 4),
        (Tar, "gradient_every", 0),
        (Tar, "inner_lrs", []),
        (Tar, "inner_lrs", [1e-3, 0.0]),
        (Tar, "decay", -1.0),
        (Tar, "tamper_scale", -1.0),
        (Tar, "retain_scale", -1.0),
        (Seam, "alpha", -1.0),
        (Seam, "beta", -1.0),
        (Seam, "epsilon", 0.0),
    ],
)
def test_bad_settings_are_refused(defense, field, value, llama):
    with pytest.raises(ValueError, match=rf"{defense.__name__}\.{field} must be .*, got .*\. "):
        make(defense, llama, **{field: value})


def test_a_resumed_run_goes_on_in_the_benign_data_too(llama, rows, tmp_path):
    """SEAM's third data set; that runs with the other two go on is in tests/contract."""
    checkpoint, ends = SaveAt(3, tmp_path / "step.ckpt"), []
    for callbacks, ckpt_path in (([], None), ([checkpoint], None), ([], checkpoint.path)):
        ends.append(make(Seam, llama, benign=rows.mixtures["val"]))
        options = {"callbacks": callbacks, "ckpt_path": ckpt_path, "weights_only": True}
        fit(ends[-1], rows.module(), NUM_STEPS, **options)
    assert_same(snapshot(ends[2].model), snapshot(ends[0].model))


class StopInAttack(Callback):
    """Asks for a stop within the attack before the fourth step, and saves when the run ends by it."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.stop_requested = trainer.global_step == 3

    def on_exception(self, trainer, pl_module, exception):
        assert isinstance(exception, RunInterrupted)
        assert pl_module.is_between_steps
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_in_an_attack_repeats_the_attack(gpt2, rows, tmp_path, accumulate):
    """Both streams, and the generator, must hand out again what the cancelled step had taken."""
    checkpoint = tmp_path / "step.ckpt"
    runs = [make(Tar, gpt2, accumulate_grad_batches=accumulate) for _ in range(3)]
    whole, stopped, resumed = runs
    torch.manual_seed(1)
    fit(whole, rows.module(), NUM_STEPS)
    torch.manual_seed(1)
    with pytest.raises(RunInterrupted, match="attack"):
        fit(stopped, rows.module(), NUM_STEPS, callbacks=[StopInAttack(checkpoint)])
    assert stopped.global_step == 3
    torch.manual_seed(99)
    fit(resumed, rows.module(), NUM_STEPS, ckpt_path=checkpoint, weights_only=True)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost


def test_owning_what_is_trained_alone(llama):
    """Wrong if shifts moved frozen weights under adapters, or named no adapter."""
    model = load(llama, lora=Lora(rank=2))
    weights = Weights(model, trained_only=True)
    assert weights.names == [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in weights.names)
    before = snapshot(model)
    with weights.shifted([torch.ones_like(parameter) for parameter in weights.parameters]):
        now = snapshot(model)
        assert {n for n in now if not torch.equal(now[n], before[n])} == set(weights.names)
    assert_same(snapshot(model), before)


def test_dropout_falls_the_same_way_on_both_sides_of_a_difference(gpt2, rows):
    """With a shift that changes nothing, the two losses on the harmful batch are the same."""
    logger = MemoryLogger()
    torch.manual_seed(0)
    fit(make(Booster, gpt2, alpha=1e-30), rows.module(), 3, logger=logger)
    assert list(logger.history["train/harmful_gain"].values()) == [0.0] * 3


def test_the_adversary_draws_its_rate_by_step(llama, rows, monkeypatch):
    """Wrong if one were never taken, or a resumed run took others."""
    drawn = []
    real = loop.finetune

    def noting(*arguments, optimizer, **options):
        drawn.append(optimizer.lr)
        return real(*arguments, optimizer=optimizer, **options)

    monkeypatch.setattr("patcher_pl.attackers.loop.finetune", noting)
    for _ in range(2):
        fit(make(Tar, llama), rows.module(), 12)
    assert drawn[:12] == drawn[12:]
    assert set(drawn) == {1e-3, 1e-2, 3e-2}


def test_the_base_model_is_not_trained_saved_or_shown(llama, rows):
    defense = make(Tar, llama)
    fit(defense, rows.module(), 2)
    assert defense.state_dict().keys() == {f"_model.{name}" for name in load(llama).state_dict()}
    with defense._base.in_place() as base:
        assert_same(snapshot(base), load(llama).state_dict())


def test_steps_that_are_lost_to_rounding_are_warned_of(llama, rows, caplog):
    fit(make(Booster, llama), rows.module(), 1, precision="bf16-true")
    assert "is mostly lost to rounding" in caplog.text


def test_half_precision_is_warned_of(llama, rows, caplog):
    fit(make(Seam, llama), rows.module(), 1, precision="bf16-mixed")
    assert "differences of gradients" in caplog.text
