"""Names and paths with brackets, or what looks like markup, are printed as they are."""

import logging

import pytest
import yaml

from patcher_pl.cli.ablate import _show
from patcher_pl.cli.console import log_progress, wide_console, write_reports
from patcher_pl.reports.ablation import Ablation, EstimatorComparison, Hardened
from patcher_pl.reports.ablation_figures import ablation_figures
from patcher_pl.reports.results import Curve
from tests.commands import cli, write_rows

NAMES = ["[red]", "[/]", "[bold]tar[/bold]", ":smile:", "a [link=x]b", "\\[red]", "{task}", "$x_1$"]


def curve(name):
    return Curve(
        defense=name,
        seed=0,
        k1=None,
        attack=f"full {name}",
        attack_steps=[0, 10],
        asr=[0.0, 1.0],
        benign_accuracy=[1.0, 1.0],
        steps_to_break=10,
        threshold=0.5,
        error=f"RuntimeError: {name}",
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_terminal", [False, True])
def test_tables_titles_and_paths(name, on_terminal, tmp_path, capsys, monkeypatch):
    """Wrong if `[/]` ended a run in a stack trace, or `[red]` vanished from a path to be copied."""
    monkeypatch.setenv("COLUMNS", "150")
    if on_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
    run_dir = tmp_path / name.replace("/", "")
    run_dir.mkdir()
    curves = [curve(name), curve("other")]
    write_reports(curves, run_dir, title=f"Red team of {name}")
    shown = capsys.readouterr().out
    for text in (f"Red team of {name}", f"RuntimeError: {name}", f"Written to {run_dir}"):
        assert text in shown
    assert shown.count(f"full {name}") == 2, "a section, and a note on what stopped early"


@pytest.mark.parametrize("name", NAMES)
def test_log_lines(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    package = logging.getLogger("patcher_pl")
    before = list(package.handlers), package.level, package.propagate
    package.handlers[:] = []
    try:
        log_progress()
        logging.getLogger("patcher_pl.redteam").info("%s under %s", name, "full_adamw")
    finally:
        package.handlers[:], package.propagate = before[0], before[2]
        package.setLevel(before[1])
    assert f"{name} under full_adamw" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_an_ablation(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    compared = [
        EstimatorComparison(estimator=one, optimizer="sgd", num_steps=2, seed=0, cosine=0.5)
        for one in (name, "exact")
    ]
    hardened = [
        Hardened(
            variant=name,
            budget=10,
            seed=0,
            gradient_evaluations=10,
            num_steps=5,
            attack=name,
            steps_to_break=10,
            longest_attack=20,
            benign_accuracy=1.0,
        )
    ]
    ablation = Ablation(comparisons=compared, hardened=hardened, environment={}, settings={})
    _show(ablation, tmp_path / "run")
    assert capsys.readouterr().out.count(name) == 3
    labels = [
        text.get_text() for text in ablation_figures(ablation)["robustness"].legends[0].get_texts()
    ]
    assert labels == [name.replace("$", r"\$")]


def test_plain_words_on_the_console(capsys):
    wide_console(80).print("plan of [red]model[/red] :rocket:")
    assert capsys.readouterr().out == "plan of [red]model[/red] :rocket:\n"


def test_a_run_directory_in_brackets_goes_through_the_command_line(llama, tmp_path):
    rows = [{"prompt": "How?", "response": "So."}]
    source = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "harmful": True}
    attack = {"class_path": "patcher_pl.redteam.Jailbreak"}
    attack["init_args"] = {"asking": {"prefill": "Sure"}, "label": "[/]"}
    redteam = {"attacks": [attack], "data": {"sources": [source]}, "prompts": {"source": source}}
    redteam |= {"judge": {"class_path": "patcher_pl.evaluation.RefusalPhraseJudge"}}
    redteam |= {"generation": {"max_new_tokens": 2}}
    config = tmp_path / "[red] team.yaml"
    config.write_text(yaml.safe_dump({"redteam": redteam, "defense": "[bold]"}))
    run_dir = tmp_path / "[red]"
    said = cli("redteam", "--config", config, "--run_dir", run_dir, "--model", llama)
    said.expect(0)
    assert f"Written to {run_dir}" in said.out
    assert "[bold]" in said.out
    assert (run_dir / "results.json").exists()
    said = cli("report", run_dir, "--out", tmp_path / "[red].html")
    said.expect(0)
    assert f"Written to {tmp_path / '[red].html'}" in said.out
