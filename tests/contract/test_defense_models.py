"""Which models, data and devices a defense takes, and what comes out of it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.defenses import SFT
from patcher_pl.defenses.strategies import require_supported
from patcher_pl.errors import ConfigError
from patcher_pl.losses import differentiable_loss
from patcher_pl.models import Lora, export_model
from tests.defense_table import TABLE, build
from tests.tiny_runs import assert_same, fit, load, snapshot
from tests.unit.defenses.test_refusals import fsdp1, trainer_of, two_shards

CONFIGS = Path(__file__).parents[2] / "configs" / "testbed"


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["every-weight", "adapters"])
def test_what_was_trained_is_exported(make, lora, llama, rows, tmp_path):
    """With adapters nothing else is trained, and anybody can load the result without peft."""
    defense = make(model={"lora": lora})
    defense.configure_model()
    start = snapshot(defense.model)
    fit(defense, rows.module(), 3)
    end = snapshot(defense.model)
    changed = {name for name, value in end.items() if not torch.equal(value, start[name])}
    trainable = {name for name, p in defense.model.named_parameters() if p.requires_grad}
    assert changed
    assert changed <= trainable
    assert trainable == {name for name in end if lora is None or ".lora_" in name}

    export_model(defense.model, defense.tokenizer, tmp_path / "model")
    loaded, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(problems.values()), problems
    assert loaded.state_dict().keys() == load(llama).state_dict().keys()
    batch = next(rows.batches("val", defense.tokenizer))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model.eval()(**inputs).logits for model in (defense.model, loaded))
        before = load(llama).eval()(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0 if lora is None else 1e-6)
    assert float((theirs - before).abs().max()) > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "cake?"}]
    assert tokenizer.chat_template is not None
    assert tokenizer.apply_chat_template(chat) == defense.tokenizer.apply_chat_template(chat)


def test_validation_without_training(make, rows):
    """As in a notebook: the loss of the model as it is, for nothing, and without harmful data."""
    defense, data = make(), rows.module(["safe", "val"])
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (found,) = Trainer(accelerator="cpu", **settings).validate(defense, data, verbose=False)
    batches = list(data.val_dataloader())
    losses = [differentiable_loss(defense.model.eval(), batch).item() for batch in batches]
    sizes = [len(batch["input_ids"]) for batch in batches]
    expected = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert defense.cost.gradient_evaluations == 0
    assert_same(snapshot(defense.model), load(defense.language_model.path).state_dict())


@pytest.mark.parametrize("strategy", [two_shards, fsdp1], ids=["fsdp2", "fsdp1"])
def test_sharded_weights_work_or_are_refused(kind, make, claims, strategy):
    """Before weights are loaded, and with another defense to use instead, which works."""
    defense = make()
    defense.trainer = trainer_of(strategy())
    if claims.one_device is None:
        require_supported(defense, defense.trainer)
        return
    message = rf"trainer\.strategy: {kind.__name__} works on one device only, got .*`trainer\.dev"
    with pytest.raises(ConfigError, match=message) as caught:
        defense.configure_model()
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = defense.model
    instead = re.findall(r"or use (\w+), .* sharded", str(caught.value))
    assert [one for one in TABLE if one.__name__ in instead and TABLE[one].one_device is None]


def test_adapters_are_sharded_where_weights_are(make, claims):
    """Not with FSDP1, and not in two number formats."""
    defense = make(model={"lora": Lora(rank=2)})
    with pytest.raises(ConfigError, match=r"LanguageModel\.lora must be null with FSDPStrategy"):
        require_supported(defense, trainer_of(fsdp1()))
    if claims.one_device is None:
        require_supported(defense, trainer_of(two_shards()))
    defense = make(model={"lora": Lora(rank=2), "dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"LanguageModel\.dtype .* Set `dtype: float32`"):
        require_supported(defense, trainer_of(two_shards()))


def test_what_it_says_about_shards_is_what_it_does(kind, claims):
    """Wrong if a reader of the docstring ordered eight GPUs for nothing."""
    text = " ".join((kind.__doc__ or "").split())
    assert ("Needs one device: see `require_shardable`" in text) == (claims.one_device is not None)


def test_it_names_its_source(kind):
    assert re.search(r"References:\n.*https://arxiv\.org/abs/\d{4}\.\d{5}", kind.__doc__)


def test_harmful_conversations_are_asked_for_where_they_are_needed(kind, make, claims, rows):
    """At once, not when an attack is due a thousand steps later."""
    defense = make()
    if not claims.needs_attack_data:
        fit(defense, rows.module(["safe"]), 1)
        return
    message = rf"SafetyDataModule\.attack: {kind.__name__} .*Set `data\.attack`, or use SFT"
    with pytest.raises(ConfigError, match=message):
        fit(defense, rows.module(["safe"]), 1)
    assert defense.cost.gradient_evaluations == 0


def test_a_model_without_layers_is_refused_where_they_are_read(make, claims, rows):
    defense = make()
    defense.configure_model()
    defense.model.config.num_hidden_layers = 9
    if not claims.reads_layers:
        fit(defense, rows.module(), 2)
        return
    with pytest.raises(ConfigError, match=r"path: LlamaForCausalLM has no list of 9 blocks.*Use "):
        fit(defense, rows.module(), 2)
    assert defense.cost.gradient_evaluations == 0


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["every-weight", "adapters"])
def test_it_trains_otherwise_than_sft(kind, lora, llama, rows):
    """Wrong if what it adds went to weights that are not trained, those under adapters say."""
    if kind is SFT:
        pytest.skip("is SFT")
    ends = []
    for one in (kind, SFT):
        torch.manual_seed(0)
        defense = build(one, llama, model={"lora": lora})
        fit(defense, rows.module(), 2)
        ends.append(snapshot(defense.model))
    ours, plain = ends
    assert any(not torch.equal(value, plain[name]) for name, value in ours.items())


def test_there_is_a_config_for_the_testbed(kind, make):
    content = yaml.safe_load((CONFIGS / f"{make().name}.yaml").read_text())
    assert content["model"]["class_path"] == f"patcher_pl.defenses.{kind.__name__}"
