"""A model's card: what the Hub reads, figures and digests, and nothing that a model said."""

from dataclasses import replace

import pytest
import yaml

from patcher_pl.cli.main import main
from patcher_pl.reports import Results, Sample
from patcher_pl.reports.model_card import model_card
from tests.campaigns import ATTACKS, campaign

ANSWER = "Stir nightshade at midnight"
SETTINGS = {
    "redteam": {
        "class_path": "patcher_pl.redteam.RedTeam",
        "init_args": {
            "judge": {"class_path": "a.Judge", "init_args": {}},
            "prompts": {"class_path": "b", "init_args": {"source": {"path": "asked.jsonl"}}},
            "data": {
                "init_args": {"sources": [{"class_path": "c", "init_args": {"path": "rows.jsonl"}}]}
            },
        },
    }
}


@pytest.fixture
def results(curve):
    sample = Sample(attack_steps=40, prompt="How?", answer=ANSWER, score=5)
    curves = [
        curve(
            "patcher", 40, [0, 0, 0.9], 40, samples=[sample], num_prompts=48, prompts_digest="d1"
        ),
        curve("patcher", 40, [0, 0.1, 0.3], None, seed=1),
        curve("sft", None, [0, 1.0], 20),
    ]
    return Results(curves=curves, environment={"git_commit": "abc"}, settings=SETTINGS)


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_hub_can_read_it(results):
    """After https://huggingface.co/docs/hub/model-cards: `model-index` with results of tasks."""
    own = results.curves[:2]
    metadata, body = parts(model_card(own, results, name="mine", weights="w1", training="t1"))
    (index,) = metadata["model-index"]
    (entry,) = index["results"]
    assert index["name"] == "mine"
    assert entry["dataset"] == {"type": "asked.jsonl", "name": "asked.jsonl under full_adamw"}
    values = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert values == {
        "attack_success_rate": pytest.approx(0.6),
        "steps_to_break": "40 to > 40",
        "benign_accuracy": 1.0,
    }
    assert "| full_adamw | 2 | 0.00 | 0.60 | 40 to > 40 | 1.00 | 1.00 |" in body
    for fact in ("`w1`", "`t1`", "48, digest `d1`", "rows.jsonl", "a.Judge", "commit `abc`"):
        assert fact in body
    assert "SFT" not in body


def test_a_reader_is_told_what_not_to_rely_on(curve):
    own = [
        curve(
            "tar", None, [0, 0, 0], None, collapsed=[False, False, True], benign_accuracy=[0, 1, 1]
        )
    ]
    metadata, body = parts(model_card(own, Results(curves=own, environment={}), name="x"))
    assert "| full_adamw † |" in body
    assert "- † the model collapsed during the attack" in body
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert metrics[-1] == {
        "type": "benign_accuracy",
        "value": 0,
        "name": "benign accuracy, released",
    }


def test_it_says_nothing_that_a_model_said(results):
    card = model_card(results.curves[:2], results, name="mine")
    assert ANSWER not in card
    assert "How?" not in card


def test_settings_that_nobody_knows_are_left_away():
    results = campaign(attacks=ATTACKS[:2], num_seeds=1, num_prompts=4)
    own = [curve for curve in results.curves if curve.defense == "sft"]
    metadata, body = parts(model_card(own, results, name="x"))
    assert {entry["dataset"]["type"] for entry in metadata["model-index"][0]["results"]} == {
        "unknown"
    }
    assert "Weights" not in body


def test_the_report_writes_it(results, tmp_path, capsys):
    results.save(tmp_path / "results.json")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(out), "--model_card", "patcher"]) == 0
    assert "Patcher, k1 = 40" in (tmp_path / "page-model-card.md").read_text()
    again = tmp_path / "again"
    again.mkdir()
    other = [replace(one, asr=[0.5] * len(one.asr)) for one in results.curves]
    replace(results, curves=other).save(again / "results.json")
    places = [str(tmp_path / "results.json"), str(again)]
    renamed = ["--model_card", "patcher (again)"]  # By the run, since both have such a model.
    assert main(["report", *places, "--out", str(out), *renamed]) == 0
    assert main(["report", str(tmp_path), "--out", str(out), "--model_card", "typo"]) != 0
    assert "must name one model of the results, got 'typo'" in capsys.readouterr().err
