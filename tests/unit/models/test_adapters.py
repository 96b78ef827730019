"""PEFT adapters as models: merged once, at loading, whoever loads them."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Lora, export_model
from tests.adapters import base_and_adapter
from tests.commands import cli, sft_settings, write_inputs, write_yaml

IDS = torch.arange(40, 60)[None]


@pytest.fixture
def adapter(tmp_path):
    return base_and_adapter(tmp_path)[1]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def rename_base(adapter, name):
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": name}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [
        None,
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "with_a_head", "ia3"],
)
def test_it_is_loaded_as_plain_weights(tmp_path, config):
    """Wrong if the bare base were measured or trained in its place."""
    base, path = base_and_adapter(tmp_path, config)
    reference = PeftModel.from_pretrained(LanguageModel(path=str(base)).load_model(), path).eval()
    model = LanguageModel(path=str(path)).load_model()
    torch.testing.assert_close(logits(model), logits(reference))
    assert type(model).__name__ == "LlamaForCausalLM"
    whole = LanguageModel(path=str(base)).load_model()
    assert list(model.state_dict()) == list(whole.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config")
    assert not model.training


def test_adapters_that_are_trained_on_top_keep_it(adapter):
    """Wrong if fresh adapters replaced those of the release, which an attack would then miss."""
    merged = LanguageModel(path=str(adapter)).load_model()
    adapted = LanguageModel(path=str(adapter), lora=Lora(rank=2)).load_model()
    torch.testing.assert_close(logits(adapted), logits(merged))


def test_an_adapter_may_stand_on_another_one(adapter, tmp_path):
    first = LanguageModel(path=str(adapter)).load_model()
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    second = get_peft_model(first, config)
    second.save_pretrained(tmp_path / "second")
    rename_base(tmp_path / "second", str(adapter))
    model = LanguageModel(path=str(tmp_path / "second"))
    torch.testing.assert_close(logits(model.load_model()), logits(second))
    assert len(model.load_tokenizer())  # That of the first.


def test_its_tokenizer_is_its_own_or_else_the_base_s(tmp_path):
    base, path = base_and_adapter(tmp_path, tokenizer=False)
    assert LanguageModel(path=str(path)).parts.tokenizer.location == str(base)
    tokenizer = LanguageModel(path=str(base)).load_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}"
    tokenizer.save_pretrained(path)
    assert LanguageModel(path=str(path)).load_tokenizer().chat_template == "{{ bos_token }}"


def test_a_vocabulary_that_had_grown_before_the_adapter_was_trained(tmp_path):
    base = LanguageModel(path=str(write_inputs(tmp_path) / "model"))
    model, tokenizer = base.load_model(), base.load_tokenizer()
    tokenizer.add_tokens(["<|potion|>"])
    model.resize_token_embeddings(len(tokenizer))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = LanguageModel(path=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded.load_model()), logits(adapted))
    assert loaded.load_config().vocab_size == len(tokenizer) == len(loaded.load_tokenizer())


def beside_whole_weights(base, adapter):
    shutil.copy(base / "model.safetensors", adapter)


def on_itself(base, adapter):
    rename_base(adapter, str(adapter))


def on_nothing(base, adapter):
    rename_base(adapter, None)


def on_a_missing_model(base, adapter):
    shutil.rmtree(base)


def on_another_model(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")


def not_a_number(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, _weights(adapter))


def pickled(base, adapter):
    torch.save(load_file(_weights(adapter)), adapter / "adapter_model.bin")
    _weights(adapter).unlink()


def _weights(adapter):
    return adapter / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (beside_whole_weights, r"holds both an adapter .* and whole weights \(model.safetensors\)"),
        (on_itself, "stands upon itself"),
        (on_nothing, r"adapter_config.json must name the model"),
        (on_a_missing_model, r"could not be loaded .* a PEFT adapter whose base can be loaded"),
        (on_another_model, r"does not fit the model that it names.*have no counterpart"),
        (not_a_number, "does not fit the model that it names"),
        (pickled, "must hold adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_merged_for_certain_is_refused(tmp_path, spoil, message):
    """Wrong if part of a release were left out without a word."""
    base, adapter = base_and_adapter(tmp_path)
    spoil(base, adapter)
    with pytest.raises(ConfigError, match=message):
        LanguageModel(path=str(adapter)).load_model()


def test_a_learned_prompt_is_refused(tmp_path):
    _, adapter = base_and_adapter(tmp_path, PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match=r"cannot be merged .* \(.*PREFIX_TUNING"):
        LanguageModel(path=str(adapter)).load_model()


def test_it_can_be_hardened_and_planned(adapter, tmp_path):
    settings = sft_settings(tmp_path)
    settings["model"]["init_args"]["language_model"]["path"] = str(adapter)
    settings["trainer"]["max_steps"] = 1
    settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-9
    config = write_yaml(tmp_path / "fit.yaml", {"run_dir": str(tmp_path / "run"), **settings})
    cli("plan", "--config", config).expect(0)
    cli("fit", "--config", config).expect(0)
    made = LanguageModel(path=str(tmp_path / "run" / "model"))
    torch.testing.assert_close(
        logits(made.load_model()), logits(LanguageModel(path=str(adapter)).load_model())
    )
    assert not made.parts.adapters


def test_an_export_of_it_is_whole(adapter, tmp_path):
    loaded = LanguageModel(path=str(adapter))
    export_model(loaded.load_model(), loaded.load_tokenizer(), tmp_path / "export")
    assert not (tmp_path / "export" / "adapter_config.json").exists()
    assert (tmp_path / "export" / "model.safetensors").exists()
