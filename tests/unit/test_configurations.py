"""A configuration says nothing twice, whichever command reads it and however deep it lies."""

import json

import pytest
import yaml

from patcher_pl.cli.given_files import require_single_keys
from patcher_pl.configurations import RepeatedKeyError, parse_configuration, read_configuration
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.reports import Results
from tests.commands import ROOT, cli


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("lr: 1\nsteps: 2\nlr: 3\n", "x:3: the key 'lr' is given twice, first in line 1"),
        ("a:\n  - b: {c: 1, c: 2}\n", "x:2: the key 'c'"),
        ("'a': 1\n\"a\": 2\n", "x:2: the key 'a'"),
        ('{"a": 1,\n"b": {"a": 1},\n"a": 2}', "x:3: the key 'a'"),
        ("a: &a {b: 1}\nc: *a\nd: {e: 1, e: 2}\n", "x:3: the key 'e'"),
    ],
)
def test_a_key_that_is_given_twice_is_named(text, place):
    with pytest.raises(RepeatedKeyError, match=place):
        parse_configuration(text, "x")


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: 1}\nc: {b: 1}\n",
        "a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n",
        "1: a\n'1': b\n",
        "",
        "- a\n- a\n",
    ],
)
def test_what_is_said_once_is_taken(text):
    assert parse_configuration(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "a: \x00"])
def test_what_cannot_be_read_is_named(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: (not valid YAML|nested too deeply)"):
        read_configuration(tmp_path / "a.yaml")


def test_every_shipped_configuration_is_single():
    for path in (ROOT / "configs").rglob("*.yaml"):
        read_configuration(path)


COMMANDS = [
    "fit",
    "validate",
    "plan",
    "redteam",
    "sweep",
    "compare",
    "ablate",
    "report",
    "attacker",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it(command, tmp_path):
    """Wrong if the last of two values were taken in silence."""
    (tmp_path / "judge.yaml").write_text("model: a\nmodel: b\n")
    config = tmp_path / "config.yaml"
    config.write_text("redteam:\n  judge: judge.yaml\n")
    said = cli(command, "--config", config)
    assert said.status == 2
    place = f"{tmp_path / 'judge.yaml'}:2: the key 'model' is given twice, first in line 1"
    assert place in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--data={a: 1, a: 2}",),
        ("--data", '{"a": 1, "a": 2}'),
        ("--redteam", "twice.yaml"),
        ("--redteam=twice.yaml",),
        ("--config=twice.conf",),
    ],
)
def test_values_and_files_of_single_options_count(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("twice.yaml", "twice.conf"):
        (tmp_path / name).write_text("a: 1\na: 2\n")
    with pytest.raises(RepeatedKeyError, match="the key 'a' is given twice"):
        require_single_keys(arguments)


@pytest.mark.parametrize("value", ["{curly", "[a, b]", "x" * 300 + ".yaml", "none.yaml"])
def test_other_values_are_left_alone(value):
    require_single_keys(["--name", value, f"--name={value}", value])


def test_results_that_say_something_twice_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"curves": [], "curves": ' + json.dumps([]) + "}")
    with pytest.raises(DataError, match="gives the key 'curves' twice"):
        Results.load(path)
