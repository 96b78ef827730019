"""If these fail, Booster, TAR or SEAM starts what cannot be right, or leaves traces in the model."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import loop
from patcher_pl.defenses import Booster, Seam, Tar, harmful_data
from patcher_pl.defenses.strategies import require_supported
from patcher_pl.errors import ConfigError, RunInterrupted
from patcher_pl.models import LanguageModel, Lora, Weights
from tests.tiny_runs import MemoryLogger, SaveAt, adamw, assert_same, fit, load, snapshot
from tests.unit.defenses.test_refusals import trainer_of, two_shards

DEFENSES = [Booster, Tar, Seam]
NUM_STEPS = 6


def make(defense, path, lora=None, **options):
    own = {}
    if defense is Tar:
        own = {"num_inner_steps": 3, "gradient_every": 2, "inner_lrs": [1e-3, 1e-2, 3e-2]}
    model = LanguageModel(path=str(path), lora=lora)
    return defense(model, **{"optimizer": adamw(), **own, **options})


@pytest.mark.parametrize("defense", DEFENSES)
def test_without_harmful_conversations_it_does_not_start(defense, llama, rows):
    made = make(defense, llama)
    message = rf"SafetyDataModule\.attack: {defense.__name__} .*Set `data\.attack`, or use SFT"
    with pytest.raises(ConfigError, match=message):
        fit(made, rows.module(["safe"]), 1)
    assert made.cost.gradient_evaluations == 0


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


@pytest.mark.parametrize("defense", [Tar, Seam])
def test_what_needs_one_device_says_so(defense, llama):
    message = rf"trainer\.strategy: {defense.__name__} works on one device only.*or use "
    with pytest.raises(ConfigError, match=message):
        require_supported(make(defense, llama), trainer_of(two_shards()))


@pytest.mark.parametrize("defense", DEFENSES)
def test_adapters_are_not_sharded(defense, llama):
    with pytest.raises(ConfigError, match=r"LanguageModel\.lora: "):
        require_supported(make(defense, llama, lora=Lora()), trainer_of(two_shards()))


def test_booster_may_be_sharded(llama):
    require_supported(make(Booster, llama), trainer_of(two_shards()))


def test_layers_that_cannot_be_read_are_refused_at_once(llama, rows):
    defense = make(Seam, llama)
    defense.configure_model()
    backbone = defense.model.base_model
    backbone.strange = backbone.norm
    del backbone.norm
    with pytest.raises(ConfigError, match=r"Seam finds no final norm in a LlamaModel .*Booster"):
        fit(defense, rows.module(), 1)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    defense, family, accumulate, rows, tmp_path, request
):
    """With dropout; wrong if the place in the harmful data, or TAR's base model, were another."""
    path = request.getfixturevalue("llama" if family == "lora" else family)
    options = {"accumulate_grad_batches": accumulate}
    if family == "lora":
        options["lora"] = Lora(rank=2, dropout=0.1)
    if defense is Seam and accumulate == 2:
        options["benign"] = rows.mixtures["val"]
    checkpoint = tmp_path / "step.ckpt"
    torch.manual_seed(1)
    whole = make(defense, path, **options)
    data = rows.module()
    fit(whole, data, NUM_STEPS)
    torch.manual_seed(1)
    fit(make(defense, path, **options), rows.module(), NUM_STEPS, callbacks=[SaveAt(3, checkpoint)])
    torch.manual_seed(99)
    resumed, resumed_data = make(defense, path, **options), rows.module(seed=5)
    fit(resumed, resumed_data, NUM_STEPS, ckpt_path=checkpoint, weights_only=True)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost
    assert resumed_data.state_dict() == data.state_dict()


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


class Watch(Callback):
    """Keeps the weights before every batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = snapshot(pl_module.model)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_what_raises_midway_leaves_the_weights_alone(defense, lora, llama, rows, monkeypatch):
    """As after Ctrl-C, when a checkpoint is written next. In the last pass at shifted weights."""
    made, watch = make(defense, llama, lora=lora), Watch()
    passes = {Booster: 2, Tar: 1, Seam: 4}[defense]
    real, calls, shifts = harmful_data.gradients_of, [], []

    def spilling(defense, weights, loss, batch):
        calls.append(None)
        if made.global_step == 1 and len(calls) == 2 * passes:
            now = snapshot(made.model)
            shifts.append(any(not torch.equal(now[k], v) for k, v in watch.before.items()))
            raise RuntimeError("spilled")
        return real(defense, weights, loss, batch)

    monkeypatch.setattr(f"{defense.__module__}.gradients_of", spilling)
    with pytest.raises(RuntimeError, match="spilled"):
        fit(made, rows.module(), 3, callbacks=[watch])
    assert shifts == [True], "nothing was shifted, so nothing is tested"
    assert_same(snapshot(made.model), watch.before)
    assert all(p.requires_grad for n, p in made.model.named_parameters() if lora is None)


@pytest.mark.parametrize("defense", DEFENSES)
def test_adapters_are_trained_and_nothing_else(defense, llama, rows):
    made = make(defense, llama, lora=Lora(rank=2))
    fit(made, rows.module(), 3)
    base = load(llama).state_dict()
    for name, parameter in made.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert parameter.requires_grad == (".lora_" in name)
        assert ".lora_" in name or torch.equal(parameter, base[plain])
        assert ".lora_B" not in name or float(parameter.detach().abs().max()) > 0


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

    monkeypatch.setattr("patcher_pl.defenses.tar.finetune", noting)
    for _ in range(2):
        fit(make(Tar, llama), rows.module(), 12)
    assert drawn[:12] == drawn[12:]
    assert set(drawn) == {1e-3, 1e-2, 3e-2}


def test_the_base_model_is_not_trained_saved_or_shown(llama, rows):
    defense = make(Tar, llama)
    fit(defense, rows.module(), 2)
    assert defense.state_dict().keys() == {f"_model.{name}" for name in load(llama).state_dict()}
    (base,) = defense._base
    assert_same(snapshot(base), load(llama).state_dict())


def test_half_precision_is_warned_of(llama, rows, caplog):
    fit(make(Seam, llama), rows.module(), 1, precision="bf16-mixed")
    assert "differences of gradients" in caplog.text
