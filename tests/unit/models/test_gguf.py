"""GGUF files as models."""

import pytest
import torch
from jsonargparse.typing import Path_fr

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, export_model
from patcher_pl.redteam import Target
from patcher_pl.types import Message
from tests.families import build_family
from tests.gguf_file import write_gguf

pytest.importorskip("gguf")
IDS = torch.arange(40, 60)[None]
PROMPT = [Message("user", "How do I brew a bitter moonroot draught?")]


def test_weights_and_tokenizer_are_those_of_the_file(tmp_path):
    """Wrong if a GGUF file had to be converted by hand, or came back as something else."""
    whole = LanguageModel(path=str(build_family("qwen2", tmp_path / "whole")))
    model, tokenizer = whole.load_model(), whole.load_tokenizer()
    (tmp_path / "gguf").mkdir()
    write_gguf(model, tokenizer, tmp_path / "gguf" / "tiny.gguf")
    packed = LanguageModel(path=str(tmp_path / "gguf"), gguf_file="tiny.gguf")
    again, words = packed.load_model(), packed.load_tokenizer()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    chat = whole.chat
    assert chat.prompt_ids(words, PROMPT) == chat.prompt_ids(tokenizer, PROMPT)
    assert chat.stop_token_ids(words) == chat.stop_token_ids(tokenizer)
    assert packed.load_config().num_hidden_layers == model.config.num_hidden_layers
    assert all(parameter.requires_grad for parameter in again.parameters())

    export_model(again, words, tmp_path / "export")
    exported = LanguageModel(path=str(tmp_path / "export"))
    torch.testing.assert_close(exported.load_model()(IDS).logits, model(IDS).logits)
    assert chat.prompt_ids(exported.load_tokenizer(), PROMPT) == chat.prompt_ids(words, PROMPT)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"LanguageModel\.gguf_file"):
        LanguageModel(path=str(tmp_path), gguf_file="none.gguf").load_model()


def test_a_model_that_fit_makes_has_no_such_file(tmp_path):
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ValueError, match=r"Target\.gguf_file must be null"):
        Target(defense="sft", fit=Path_fr(str(tmp_path / "a.yaml")), gguf_file="a.gguf")
