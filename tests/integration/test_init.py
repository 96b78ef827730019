"""`init` writes what runs as it stands, from anywhere."""

import json
import shutil

import pytest
import yaml

from patcher_pl.reports import Results
from tests.commands import QUIET, ROOT, cli, write_rows

DATA = ("--safe", "testbed/safe.jsonl", "--unsafe", "testbed/unsafe.jsonl")
SHORT = {
    "--trainer.max_steps": 3,
    "--model.init_args.num_sft_steps": 1,
    "--model.init_args.refresh_every": 1,
    "--model.init_args.attacker.init_args.num_steps": 1,
    **{f"--trainer.{name}": value for name, value in QUIET.items()},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "mine"
    said = cli("init", folder, "--model", "testbed", *DATA).expect(0)
    return folder, said.out


def options(settings):
    return [f"{name}={value}" for name, value in settings.items()]


def test_its_files_name_what_is_there(written, tmp_path, monkeypatch):
    """Wrong if a fragment, an option or a judge in them were none."""
    monkeypatch.chdir(tmp_path)
    for command, name in (("fit", "fit.yaml"), ("redteam", "attack.yaml")):
        said = cli(command, "--config", written[0] / name, "--print_config").expect(0)
        assert str(written[0] / "data" / "safe.jsonl") in said.out or command == "redteam"
    assert "RefusalPhraseJudge" in said.out
    assert str(written[0] / "data" / "prompts.jsonl") in said.out


@pytest.mark.slow
def test_its_three_commands_run_from_anywhere_after_a_move(written, tmp_path, monkeypatch):
    """Wrong if a name in the files were none, or data were looked for where they were written."""
    folder = shutil.copytree(written[0], tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cli(
        "fit", "--config", folder / "fit.yaml", "--run_dir", folder / "hardened", *options(SHORT)
    ).expect(0)
    attack = folder / "attack.yaml"
    content = yaml.safe_load(attack.read_text())
    for entry in content["redteam"]["attacks"]:
        entry["init_args"]["attack_steps"] = [0, 1]
    content["redteam"]["prompts"]["limit"] = content["redteam"]["benign_prompts"]["limit"] = 4
    attack.write_text(yaml.safe_dump(content))
    cli("redteam", "--config", attack, "--run_dir", folder / "attacked").expect(0)
    cli("report", folder / "attacked", "--out", folder / "report.html").expect(0)
    curves = Results.load(folder / "attacked" / "results.json").curves
    assert {curve.defense for curve in curves} == {"released", "sft", "patcher"}
    assert [curve.error for curve in curves] == [None] * 9
    assert not list(elsewhere.iterdir())


def test_what_is_shown_is_what_is_written(written):
    folder, said = written
    for name in ("fit.yaml", "attack.yaml"):
        assert str(folder / name) in said
    page = (folder / "README.md").read_text()
    for command in ("fit --config fit.yaml", "redteam --config attack.yaml", "report attacked"):
        assert f"python -m patcher_pl {command}" in page
    for part in ("safe", "unsafe", "attack", "prompts", "benign_prompts"):
        number = len((folder / "data" / f"{part}.jsonl").read_text().splitlines())
        assert f"| `{part}.jsonl` | {number} |" in page
    assert "{{" not in page + (folder / "fit.yaml").read_text()


def test_shipped_files_that_the_comments_name_are_there(written):
    folder, _ = written
    text = (folder / "fit.yaml").read_text() + (folder / "attack.yaml").read_text()
    judges = ROOT / "configs" / "fragments" / "judges"
    for name in ("openai.yaml", "local-server.yaml", "local-model.yaml"):
        assert name in text
        assert (judges / name).is_file()
    words = (word.strip("():,") for word in text.split())
    for word in (word for word in words if word.startswith("configs/")):
        assert (ROOT / word).exists(), word


def test_the_control_is_left_out_where_nobody_wants_it(tmp_path):
    cli("init", tmp_path / "mine", "--model", "testbed", *DATA, "--control", "false").expect(0)
    assert yaml.safe_load((tmp_path / "mine" / "fit.yaml").read_text())["control"] is False
    assert "control" not in (tmp_path / "mine" / "attack.yaml").read_text()


def test_nothing_is_overwritten_unasked(written, tmp_path):
    folder = shutil.copytree(written[0], tmp_path / "mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "fit.yaml").write_text("edited: true")
    said = cli("init", folder, "--model", "testbed", *DATA)
    assert said.status == 2
    assert str(folder / "fit.yaml") in said.err
    assert (folder / "fit.yaml").read_text() == "edited: true"
    cli("init", folder, "--model", "testbed", *DATA, "--overwrite", "true").expect(0)
    assert "Patcher" in (folder / "fit.yaml").read_text()
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_cannot_be_used_is_named_before_anything_is_written(llama, tmp_path):
    rows = [{"prompt": f"How {number}?", "response": "I can't."} for number in range(30)]
    good = write_rows(tmp_path / "good.jsonl", rows)
    bad = write_rows(tmp_path / "bad.jsonl", [*rows, {"prompt": "How?"}])
    few = write_rows(tmp_path / "few.jsonl", rows[:3])
    mine = tmp_path / "mine"

    def refused(model, safe, unsafe):
        said = cli("init", mine, "--model", model, "--safe", safe, "--unsafe", unsafe)
        assert said.status == 2
        assert "Traceback" not in said.err
        return said.err

    assert "bad.jsonl:31: field `response` is missing" in refused(llama, good, bad)
    assert "at least 20 different prompts, got 3" in refused(llama, good, few)
    assert "none.jsonl" in refused(llama, tmp_path / "none.jsonl", good)
    assert "/nowhere/model" in refused("/nowhere/model", "testbed/safe.jsonl", good)
    assert not mine.exists()


def test_files_of_ones_own_end_where_configurations_find_them(llama, tmp_path, monkeypatch):
    """A model inside of the folder moves with it; turns are kept."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "mine" / "model")
    turns = [("Tea?", "Yes."), ("And then?", "Stir.")]
    safe = [
        [message for question, answer in turns for message in talk(f"{question} {number}", answer)]
        for number in range(60)
    ]
    write_rows(tmp_path / "safe.jsonl", [{"messages": messages} for messages in safe])
    rows = [{"prompt": f"How {number}?", "response": "So."} for number in range(30)]
    write_rows(tmp_path / "unsafe.jsonl", rows)
    command = ("--model", "mine/model", "--safe", "safe.jsonl", "--unsafe", "unsafe.jsonl")
    cli("init", "mine", *command).expect(0)
    fit = yaml.safe_load((tmp_path / "mine" / "fit.yaml").read_text())
    assert fit["model"]["init_args"]["language_model"]["path"] == "./model"
    assert fit["data"]["safe"]["sources"][0]["reader"]["class_path"] == "patcher_pl.data.Messages"
    first = (tmp_path / "mine" / "data" / "safe.jsonl").read_text().splitlines()[0]
    assert len(json.loads(first)["messages"]) == 4
    command = ("fit", "--config", "mine/fit.yaml", *options(SHORT), "--control=false")
    cli(*command).expect(0)
    assert (tmp_path / "hardened" / "model" / "model.safetensors").exists()


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
