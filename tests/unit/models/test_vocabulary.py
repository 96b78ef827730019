"""Tokenizers and embeddings that do not belong together."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from tests.commands import cli, sft_settings, write_inputs, write_yaml
from tests.families import build_family


def grown(directory, **more):
    """The family's tokenizer with one token more than its model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(build_family("llama", directory))
    num_rows = len(tokenizer)
    if not more:
        tokenizer.add_tokens(["<|potion|>"])
    tokenizer.save_pretrained(directory)
    if more:
        file = directory / "tokenizer.json"
        content = json.loads(file.read_text())
        token = {**content["added_tokens"][0], "id": num_rows, "content": "<image_soft_token>"}
        content["added_tokens"].append(token)
        file.write_text(json.dumps(content))
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return LanguageModel(path=str(directory)), num_rows


def test_both_sizes_are_named(tmp_path):
    """Wrong if the first row with such a token ended the run in an IndexError."""
    model, rows = grown(tmp_path)
    message = rf"has {rows + 1} tokens, the embedding of the model {rows} rows .*'<\|potion\|>'"
    with pytest.raises(ConfigError, match=message):
        model.load_tokenizer()


@pytest.mark.parametrize("command", ["fit", "redteam"])
def test_it_is_said_before_anything_is_trained(tmp_path, command):
    inputs = write_inputs(tmp_path)
    grown(inputs / "model")
    config = write_yaml(
        tmp_path / "fit.yaml", {"run_dir": str(tmp_path / "run"), **sft_settings(inputs)}
    )
    if command == "fit":
        outcome = cli("fit", "--config", config).expect(2)
    else:
        from tests.commands import redteam_settings

        settings = {"redteam": redteam_settings(inputs), "model": str(inputs / "model")}
        config = write_yaml(
            tmp_path / "attack.yaml", {"run_dir": str(tmp_path / "run"), **settings}
        )
        outcome = cli("redteam", "--config", config).expect(2)
    assert "embedding of the model" in outcome.err


def test_placeholders_of_pictures_need_no_row(tmp_path):
    """Gemma 3's text models have one: no text becomes it."""
    model, rows = grown(tmp_path, extra_special_tokens={"image_token": "<image_soft_token>"})
    tokenizer = model.load_tokenizer()
    assert max(tokenizer.get_vocab().values()) == rows


def test_an_embedding_that_is_not_as_large_as_its_config_says(tmp_path):
    build_family("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 7}))
    with pytest.raises(ConfigError, match=r"the model of .* could not be loaded"):
        LanguageModel(path=str(tmp_path)).load_model()


def test_a_tokenizer_without_a_template_says_so_once_at_loading(gpt2, tmp_path, caplog):
    """Wrong if whoever trained with our template learned of it from nothing, or from every line."""
    path = shutil.copytree(gpt2, tmp_path / "model")
    for _ in range(2):
        assert LanguageModel(path=str(path)).load_tokenizer().chat_template
    assert caplog.text.count("has no chat template") == 1
