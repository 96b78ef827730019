"""If these fail, defenses that work on hidden embeddings find others, or leave traces in the model."""

import pytest
import torch

from patcher_pl.defenses import RepNoise, TVaccine, Vaccine
from patcher_pl.defenses.perturbation import shifted_outputs
from patcher_pl.errors import ConfigError
from patcher_pl.losses import differentiable_loss, maximum_mean_discrepancy
from patcher_pl.models import LanguageModel, Lora, export_model
from patcher_pl.models.blocks import attention_of, blocks_of, feed_forward_of, final_norm_of
from tests.families import FAMILIES, build_family
from tests.tiny_runs import MemoryLogger, SaveAt, adamw, fit, load, snapshot


def make(kind, path, *, language_model=None, **options):
    settings = {"optimizer": adamw(), **options}
    if kind is TVaccine:
        settings |= {"num_layers": 1, "resample_every": 2, "measure_every": 3} | options
    return kind(LanguageModel(path=str(path), **(language_model or {})), **settings)


KINDS = pytest.mark.parametrize("kind", [Vaccine, TVaccine, RepNoise])


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_parts_of_a_block_are_found_in_every_family(family, tmp_path):
    model = load(build_family(family, tmp_path / family))
    blocks = blocks_of(model)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        assert type(attention_of(block)).__name__.endswith("Attention")
        assert type(feed_forward_of(block)).__name__.endswith("MLP")
    inner = model.base_model
    assert final_norm_of(model) is (inner.ln_f if family == "gpt2" else inner.norm)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@KINDS
def test_every_kind_of_model_is_trained_and_left_without_hooks(kind, family, lora, rows, tmp_path):
    path = build_family(family, tmp_path / family)
    defense = make(kind, path, language_model={"lora": lora})
    defense.configure_model()
    before, hooks = snapshot(defense.model), hooks_of(defense.model)
    required = [p.requires_grad for p in defense.model.parameters()]
    fit(defense, rows.module(), 3)
    after = snapshot(defense.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert lora is None or all(".lora_" in name for name in changed)
    assert hooks_of(defense.model) == hooks
    assert [p.requires_grad for p in defense.model.parameters()] == required
    export_model(defense.model, defense.tokenizer, tmp_path / "model")
    assert load(tmp_path / "model").state_dict().keys() == load(path).state_dict().keys()


def test_both_passes_drop_the_same(gpt2, rows):
    """Wrong if the gap between the losses were one of dropout masks, not of the perturbation."""
    defense, plain = make(Vaccine, gpt2, rho=0.0), make(Vaccine, gpt2)
    assert load(gpt2).config.resid_pdrop > 0
    for one in (defense, plain):
        torch.manual_seed(3)
        fit(one, rows.module(), 1)
    assert float(defense.trainer.callback_metrics["train/perturbation_gap"]) == 0
    assert float(plain.trainer.callback_metrics["train/perturbation_gap"]) > 0


@KINDS
def test_recomputed_activations_are_perturbed_too(kind, llama, rows):
    """Wrong if gradient checkpointing read other embeddings on the way back."""
    runs = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "dtype": "float64"}
        runs.append(make(kind, llama, language_model=settings))
        fit(runs[-1], rows.module(), 3)
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    assert max(float((one - other).detach().abs().max()) for one, other in pairs) < 1e-7


def test_the_perturbation_has_the_length_that_was_asked_for(llama, rows):
    """Over all layers, rows and positions together."""
    defense = make(Vaccine, llama, rho=0.7)
    lengths = []

    def watch(modules, shifts):
        if shifts:
            total = sum(float(shift.detach().square().sum()) for shift in shifts.values())
            lengths.append(total**0.5)
        return shifted_outputs(modules, shifts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patcher_pl.defenses.perturbation.shifted_outputs", watch)
        fit(defense, rows.module(), 2)
    assert lengths == pytest.approx([0.7, 0.7], rel=1e-5)


def test_a_shift_moves_the_output_and_is_gone_afterwards(llama, rows):
    model = load(llama)
    batch = next(rows.batches("safe", LanguageModel(path=str(llama)).load_tokenizer()))
    module = attention_of(blocks_of(model)[0])
    shift = {module: torch.ones(*batch["input_ids"].shape, model.config.hidden_size)}
    with torch.no_grad():
        before = differentiable_loss(model, batch)
        with shifted_outputs([module], shift):
            assert differentiable_loss(model, batch) != before
        assert differentiable_loss(model, batch) == before


def test_frozen_layers_do_not_move(llama, rows):
    """Not even by the weight decay of an optimizer that has moved them before."""
    defense = make(TVaccine, llama, resample_every=100)
    start = load(llama).state_dict()
    fit(defense, rows.module(), 3)
    (drawn,) = defense.drawn
    moved = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, value in snapshot(defense.model).items()
        if ".layers." in name and not torch.equal(value, start[name])
    }
    assert moved == {drawn}


def test_no_layer_is_frozen_where_that_is_not_wanted(llama, rows):
    defense = make(TVaccine, llama, freeze_others=False)
    start = load(llama).state_dict()
    fit(defense, rows.module(), 2)
    assert all(not torch.equal(v, start[k]) for k, v in snapshot(defense.model).items())


def test_the_layers_in_use_are_those_of_the_checkpoint(llama, rows, tmp_path):
    path = tmp_path / "step.ckpt"
    first = make(TVaccine, llama, resample_every=100)
    fit(first, rows.module(), 3, callbacks=[SaveAt(1, path)])
    other = [1 - first.drawn[0]]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["defense"]["drawn"] = other
    torch.save(checkpoint, path)
    resumed = make(TVaccine, llama, resample_every=100)
    fit(resumed, rows.module(), 3, ckpt_path=path, weights_only=True)
    assert resumed.drawn == other


def test_identical_samples_are_no_distance_apart():
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    settings = {"num_kernels": 5, "kernel_factor": 2.0}
    assert maximum_mean_discrepancy(rows, rows, **settings).item() == pytest.approx(0, abs=1e-12)
    assert maximum_mean_discrepancy(rows, rows + 3, **settings).item() > 1


def test_more_layers_than_there_are_are_refused(llama, rows):
    with pytest.raises(ConfigError, match=r"TVaccine\.num_layers must be <= 2, .* got 3\. Set"):
        fit(make(TVaccine, llama, num_layers=3), rows.module(), 1)


def test_what_the_layers_are_drawn_by_is_logged(llama, rows):
    """Where it was measured anew, here before the first and the fourth step."""
    logger = MemoryLogger()
    fit(make(TVaccine, llama), rows.module(), 5, logger=logger)
    assert sorted(logger.history["train/loss_harmful"]) == [0, 3]
    shares = [logger.history[f"layers/p_{layer}"] for layer in range(2)]
    assert all(share[step] > 0 for share in shares for step in (0, 3))
    assert sum(share[3] for share in shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Vaccine, "rho", -1.0),
        (TVaccine, "rho", -1.0),
        (TVaccine, "num_layers", 0),
        (TVaccine, "resample_every", 0),
        (TVaccine, "measure_every", 0),
        (RepNoise, "alpha", -1.0),
        (RepNoise, "beta", -1.0),
        (RepNoise, "num_kernels", 0),
        (RepNoise, "kernel_factor", 1.0),
    ],
)
def test_bad_settings_are_refused(kind, field, value, llama):
    message = rf"{kind.__name__}\.{field} must be .*, got {value}\. [A-Z]"
    with pytest.raises(ValueError, match=message):
        make(kind, llama, **{field: value})
