"""What is told about a model from its configuration alone."""

import json

import pytest
from transformers import AutoConfig

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from patcher_pl.starter import ModelFacts, lengths
from patcher_pl.types import Conversation, Message

SMALL = {"vocab_size": 300, "pad_token_id": 299}
# From their own documentation: the first three go by `position_ids`, the others do not.
PACKING = {
    "llama": ({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8}, True),
    "gemma3_text": ({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8}, True),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 1024}, True),
    "bloom": ({"hidden_size": 64, "n_head": 4, "n_layer": 4}, False),
    "mamba": ({"hidden_size": 64, "num_hidden_layers": 4}, False),
    "gpt_neo": (
        {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
        False,
    ),
}


def config_only(folder, kind, **settings):
    AutoConfig.for_model(kind, **SMALL | settings).save_pretrained(folder)
    return LanguageModel(path=str(folder))


@pytest.mark.parametrize("kind", PACKING)
def test_packing_is_switched_on_where_the_model_allows_it(kind, tmp_path):
    """Wrong if `fit` refused what `init` wrote, or padded where it need not."""
    settings, packs = PACKING[kind]
    assert ModelFacts.of(config_only(tmp_path, kind, **settings)).packs is packs


def test_a_model_of_eight_billion_weights_is_looked_at_without_loading_it(tmp_path):
    """Wrong if the folder could only be written where the model fits."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    facts = ModelFacts.of(config_only(tmp_path, "llama", **large, **heads))
    assert facts.num_parameters == 8_030_261_248
    assert (facts.is_large, facts.precision, facts.num_threads) == (True, "bf16-mixed", None)
    assert facts.packs


def test_a_tiny_model_gets_one_thread(llama):
    facts = ModelFacts.of(LanguageModel(path=str(llama)))
    assert (facts.is_large, facts.precision, facts.num_threads) == (False, "32-true", 1)


def test_a_model_that_is_none_is_named(tmp_path):
    config_only(tmp_path, "vit")
    with pytest.raises(ConfigError, match=f"--model: {tmp_path} is no causal language model"):
        ModelFacts.of(LanguageModel(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="could not be loaded"):
        ModelFacts.of(LanguageModel(path=str(tmp_path)))


def test_lengths_are_those_of_the_data_up_to_what_is_of_use(llama):
    model = LanguageModel(path=str(llama))

    def of(answer):
        turns = Message("user", "Tea?"), Message("assistant", answer)
        return lengths(model, [Conversation(turns, False, "row")], context=256)

    assert of("Yes.")[0] % 64 == 0
    assert of("Yes.")[0] < 256
    assert of("Stir. " * 2000) == (256, 256)
