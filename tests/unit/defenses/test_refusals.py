"""If these fail, a run that cannot be right starts all the same, or dies without saying why."""

import pytest
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from patcher_pl.optim import SGD
from tests.tiny_runs import ATTACKER, adamw, assert_same, fit, load, snapshot


@pytest.fixture
def model(llama):
    return LanguageModel(path=str(llama))


def test_half_precision_with_loss_scaling_is_refused(model, rows):
    with pytest.raises(ConfigError, match=r"trainer\.precision: '16-mixed' .* Use `bf16-mixed`"):
        fit(SFT(model), rows.module(), 1, plugins=[MixedPrecision("16-mixed", "cpu")])


def test_several_devices_are_refused(model):
    defense = SFT(model)
    defense.trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match=r"trainer\.devices: SFT .* got 2\. Set .*devices: 1`"):
        defense.on_fit_start()


def test_patcher_without_attack_data_is_refused_at_once(model, rows):
    """And not a thousand steps later, when the first attack is due."""
    defense = Patcher(model, ATTACKER)
    with pytest.raises(ConfigError, match=r"SafetyDataModule\.attack: .*or use SFT"):
        fit(defense, rows.module(["safe"]), 1)
    assert defense.cost.gradient_evaluations == 0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_patcher_without_a_data_module_is_refused(model, rows):
    with pytest.raises(ConfigError, match=r"SafetyDataModule\.attack"):
        fit(Patcher(model, ATTACKER), [], 1)


def test_an_attack_that_diverges_is_refused_before_it_spoils_the_model(llama, model, rows):
    wild = FineTuningAttacker(num_steps=3, optimizer=SGD(lr=1e38), max_grad_norm=None)
    defense = Patcher(model, wild, optimizer=adamw(), num_sft_steps=0)
    with pytest.raises(ConfigError, match=r"diverged at defender step 0 .*attacker\.optimizer\.lr"):
        fit(defense, rows.module(), 2)
    assert_same(snapshot(defense.model), load(llama).state_dict())


def test_the_model_is_named_where_it_is_missing(model):
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = SFT(model).model


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", -0.1), ("alpha", 1.1), ("refresh_every", 0), ("num_sft_steps", -1)],
)
def test_bad_settings_of_patcher_are_refused(model, field, value):
    with pytest.raises(ValueError, match=rf"Patcher\.{field} must be .*, got {value}\. Use "):
        Patcher(model, ATTACKER, **{field: value})
