"""Where the architecture of a model comes from."""

import json

import pytest
from transformers import AutoConfig

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from patcher_pl.planning.architecture import find_architecture

MODEL = LanguageModel(path="moon/root")


@pytest.fixture
def beside(inputs, tmp_path, monkeypatch):
    """Writes config.json beside a configuration, as the model's of that name; there is no hub."""
    original = AutoConfig.from_pretrained

    def without_hub(path, **options):
        if str(path) == MODEL.path:
            raise OSError("no network in tests")
        return original(path, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", without_hub)
    content = json.loads((inputs / "model" / "config.json").read_text())

    def write(name):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**content, "_name_or_path": name}))
        return path

    return write


def test_what_lies_beside_the_configuration_is_taken_if_it_is_the_models(beside, tmp_path):
    """Wrong if a stranger's config.json were taken for the model's."""
    stranger = beside("sun/root")
    with pytest.raises(ConfigError, match="--model_config"):
        find_architecture(MODEL, None, [tmp_path])
    assert find_architecture(MODEL, stranger, []).model_type == "llama"
    beside(MODEL.path)
    assert find_architecture(MODEL, None, [tmp_path]).model_type == "llama"


def test_the_models_own_directory_comes_first(inputs, beside, tmp_path):
    own = LanguageModel(path=str(inputs / "model"))
    path = beside(own.path)
    path.write_text(path.read_text().replace('"llama"', '"nothing"'))
    assert find_architecture(own, None, [tmp_path]).model_type == "llama"
