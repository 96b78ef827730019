"""A run of `fit` depends on what its configuration names, however deep."""

import pytest

from patcher_pl.errors import ConfigError
from patcher_pl.jobs import Fit


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A configuration that names a model, data and a red team, which names further files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "model").mkdir()
    written = {
        "configs/base.yaml": "model: {init_args: {language_model: {path: model}}}\n"
        "data: {safe: {sources: [{path: safe.jsonl}]}}\n"
        "redteam: redteam.yaml\nnote: " + "long " * 100,
        "configs/redteam.yaml": "prompts: {source: {path: prompts.csv}}\n"
        "judge: {init_args: {rubric: rubric.txt, cache: verdicts.sqlite}}\n",
        **dict.fromkeys(("safe.jsonl", "prompts.csv", "rubric.txt", "verdicts.sqlite"), "some"),
        **dict.fromkeys(("model/config.json", "model/model.safetensors", "option.jsonl"), "some"),
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(files):
    options = {"data.val.sources": [{"path": "option.jsonl"}]}
    return Fit.plan(files / "run", files / "configs" / "base.yaml", options).digest


@pytest.mark.parametrize(
    "name",
    [
        "configs/redteam.yaml",
        "safe.jsonl",
        "prompts.csv",
        "rubric.txt",
        "option.jsonl",
        "model/config.json",
        "model/model.safetensors",
    ],
)
def test_it_is_made_again_where_something_it_names_has_changed(files, name):
    """Wrong if a sweep called runs "done already" whose data, model or rubric had changed."""
    before = digest(files)
    assert digest(files) == before
    with (files / name).open("a") as file:
        file.write("\n# more")
    assert digest(files) != before


def test_what_it_writes_itself_changes_nothing(files):
    """Wrong if a finished run were another one because its judge had kept verdicts."""
    before = digest(files)
    (files / "verdicts.sqlite").write_text("more")
    (files / "model" / "notes.md").write_text("more")
    assert digest(files) == before


def test_a_broken_configuration_is_named(files):
    (files / "configs" / "redteam.yaml").write_text("prompts: [")
    with pytest.raises(ConfigError, match=r"redteam\.yaml: not valid YAML"):
        digest(files)


def digest_of_world(files, model):
    options = {"data.val.sources": [{"path": f"facts:{model}/safe.jsonl"}]}
    return Fit.plan(files / "run", files / "configs" / "base.yaml", options).digest


def test_data_of_a_world_depends_on_the_model_that_it_is_built_for(files):
    """Wrong if a run stayed "done already" after the model whose knowledge is its data was changed."""
    (files / "asked").mkdir()
    for name in ("config.json", "model.safetensors"):
        (files / "asked" / name).write_text("some")
    before = digest_of_world(files, "asked")
    assert digest_of_world(files, "asked") == before
    (files / "asked" / "model.safetensors").write_text("other weights")
    assert digest_of_world(files, "asked") != before


def test_a_world_without_its_model_is_for_the_run_to_refuse(files):
    assert digest_of_world(files, "/no/such/model")
