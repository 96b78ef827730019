"""Digests follow what files, models and data sets hold, wherever they lie."""

import json

import pytest
from huggingface_hub import constants

from patcher_pl import contents
from patcher_pl.contents import data_digest, file_digest, model_digest
from patcher_pl.data import Source
from patcher_pl.models import LanguageModel


def write_model(folder, weights="abc"):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def test_names_and_times_do_not_count_but_content_does(tmp_path):
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (second / "training.log").write_text("step 1")
    assert model_digest(str(first)) == model_digest(str(second))
    (second / "additional_chat_templates").mkdir()
    (second / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert model_digest(str(first)) != model_digest(str(second))


def test_adapters_depend_on_the_model_under_them(tmp_path):
    """Wrong if a released adapter passed for the same model on another base."""
    base, adapters = write_model(tmp_path / "base"), tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_model.safetensors").write_text("small")
    config = {"base_model_name_or_path": str(base)}
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    before = model_digest(str(adapters))
    (base / "model.safetensors").write_text("abcd")
    assert model_digest(str(adapters)) != before


def test_a_file_is_read_once(tmp_path, monkeypatch):
    """Wrong if every cell of a grid read all weights again."""
    path = tmp_path / "model.gguf"
    path.write_text("abc")
    before = file_digest(path)
    monkeypatch.setattr(contents.hashlib, "file_digest", None)
    assert file_digest(path) == before == model_digest(str(path))


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_was_fetched_counts_by_its_commit(tmp_path, monkeypatch, kind):
    """Wrong if a model on the hub were the same for ever, or another one for want of a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / f"{kind}s--potions--brews"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    contents._hub_commit.cache_clear()
    digest = model_digest if kind == "model" else data_digest
    named = LanguageModel if kind == "model" else Source
    assert digest("potions/brews") == digest("potions/brews", "c0ffee") == "c0ffee"
    assert named(path="potions/brews").contents() == {"path": "c0ffee"}
    assert digest("potions/elsewhere") is None
    assert named(path="potions/elsewhere").contents() == {}
    assert digest("no name") is None


def test_a_base_beside_its_adapter_counts(tmp_path):
    """Wrong if another base under the same adapter passed for the same model."""
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    found = set()
    for content in (b"one", b"another"):
        (base / "model.safetensors").write_bytes(content)
        found.add(model_digest(str(tmp_path)))
    assert len(found) == 2
