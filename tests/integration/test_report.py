"""The `report` command, on files of this program and of another one."""

import csv
import json
import subprocess
import sys

import pytest

from patcher_pl.reports import Results
from tests.campaigns import ATTACKS, campaign
from tests.commands import ROOT, cli

# By hand, with what the schema requires and nothing else.
FOREIGN = {
    "curves": [
        {
            "defense": defense,
            "seed": 0,
            "k1": None,
            "attack": "lora",
            "attack_steps": [0, 50],
            "asr": [0.1, asr],
            "benign_accuracy": [None, None],
            "steps_to_break": 50 if asr >= 0.5 else None,
            "threshold": 0.5,
        }
        for defense, asr in (("base", 0.9), ("tar", 0.3))
    ]
}


@pytest.fixture
def runs(tmp_path):
    """A run directory of this program and a file of another one."""
    campaign(attacks=ATTACKS[1:4], num_seeds=2, num_prompts=8, steps=[0, 20, 80]).save(
        tmp_path / "ours" / "results.json"
    )
    (tmp_path / "theirs.json").write_text(json.dumps(FOREIGN))
    return tmp_path


def test_runs_of_two_programs_become_one_page_and_three_tables(runs):
    out = runs / "report" / "report.html"
    said = cli("report", runs / "ours", runs / "theirs.json", "--out", out).expect(0)
    assert str(out) in said.out
    assert {path.name for path in out.parent.iterdir()} == {
        "report.html",
        "report.csv",
        "report.md",
        "report.tex",
    }
    page = out.read_text(encoding="utf-8")
    for text in ("SFT", "Patcher, k1 = 120", "TAR", "Base", "from 2 runs"):
        assert text in page
    with out.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = {(row["attack"], row["defense"]): row for row in csv.DictReader(file)}
    assert rows["lora", "tar"]["asr"] == "0.3"
    assert rows["lora", "tar"]["outcome"] == "held to 50"
    assert rows["full_adamw_lr1e-3", "patcher"]["marks"] == "collapsed"
    assert r"\toprule" in out.with_suffix(".tex").read_text(encoding="utf-8")
    assert "| lora |" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no results could be read"),
        (["theirs.json", "--out", "page.pdf"], "--out must end in .html"),
        (["theirs.json", "--baseline", "sft"], "There are: Base, TAR"),
        (["theirs.json", "--num_samples", "-1"], "--num_samples must be >= 0"),
        (["theirs.json", "--depth", "3"], "--depth"),
        ([], "required: dirs"),
        (["empty.json"], "no attack has been run yet"),
    ],
)
def test_what_cannot_be_done_is_said(runs, monkeypatch, arguments, words):
    monkeypatch.chdir(runs)
    Results(curves=[], environment={}).save(runs / "empty.json")
    said = cli("report", *arguments).expect(2)
    assert words in said.err
    assert not list(runs.glob("*.html"))


def test_a_report_loads_neither_torch_nor_lightning(runs):
    """Wrong if whoever draws a report had to have what trains models."""
    probe = (
        "import sys, patcher_pl.cli\n"
        f"assert patcher_pl.cli.main(['report', {str(runs / 'theirs.json')!r},"
        f" '--out={runs / 'x.html'}']) == 0\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (runs / "x.html").stat().st_size > 10_000
