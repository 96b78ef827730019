"""What is measured on benign prompts depends on the judge, and is called so everywhere."""

import json
from dataclasses import replace

import pytest

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.data import Messages
from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.sources import Source
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.evaluation import (
    Benchmark,
    Generation,
    LlmJudge,
    ModerationClassifier,
    ReferenceJudge,
    RefusalPhraseJudge,
)
from patcher_pl.optim import AdamW
from patcher_pl.redteam import FullFinetuning
from patcher_pl.reports import Results
from patcher_pl.reports.command import run_report
from patcher_pl.reports.results import known_benign
from tests.commands import write_rows


@pytest.fixture
def team(red_team):
    attack = FullFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 1])
    return replace(red_team, attacks=[attack], benign_prompts=red_team.prompts)


@pytest.mark.parametrize(
    ("judges", "name", "other"),
    [
        ({"judge": RefusalPhraseJudge()}, "benign compliance", "benign accuracy"),
        ({"benign_judge": ReferenceJudge()}, "benign accuracy", "benign compliance"),
    ],
)
def test_every_table_says_which_it_is(model_dir, team, judges, name, other, tmp_path, capsys):
    """Wrong if "did not refuse" passed for "is right": a model that knows nothing had 1.00."""
    run_redteam(replace(team, **judges), tmp_path, str(model_dir), device="cpu")
    run_report([tmp_path], tmp_path / "report.html")
    shown = " ".join(capsys.readouterr().out.replace("\n", " ").split())
    page = (tmp_path / "report.html").read_text()
    for text in (shown, page):
        assert name in text
        assert other not in text
    field, missing = name.replace(" ", "_"), other.replace(" ", "_")
    (curve,) = json.loads((tmp_path / "results.json").read_text())["curves"]
    assert None not in curve[field]
    assert curve[missing] == [None, None]
    (curve,) = Results.load(tmp_path / "results.json").curves
    assert known_benign([curve]) == [field]
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    place = header.split(",").index(missing)
    assert [row.split(",")[place] for row in rows] == ["", ""]


def test_a_judge_with_references_measures_accuracy_only_where_all_are_known(team, tmp_path):
    llm = LlmJudge(model="judge")
    measure = {"references": [True, True], "no reference": [True, False]}
    rows = [{"prompt": "How?", "response": "So."}, {"prompt": "Why?", "response": None}]
    for name, known in measure.items():
        path = tmp_path / f"{name}.jsonl"
        kept = [
            {
                "messages": [{"role": "user", "content": row["prompt"]}]
                + [{"role": "assistant", "content": "So."}] * is_known
            }
            for row, is_known in zip(rows, known, strict=True)
        ]
        questions = Benchmark(
            source=Source(path=str(write_rows(path, kept)), reader=Messages())
        ).questions()
        found = replace(team, judge=llm).record([], questions).benign_measure
        assert found == ("benign_accuracy" if all(known) else "benign_compliance")
        free = replace(team, judge=replace(llm, rubric=tmp_path / "rubric.txt"))
        assert free.record([], questions).benign_measure == "benign_compliance"


def test_a_missing_reference_is_heard_of_before_the_first_attack(team, model_dir, tmp_path):
    prompts = Benchmark(
        source=Source(
            path=str(
                write_rows(tmp_path / "sums.jsonl", [{"prompt": "1 + 1?", "response": "#### two"}])
            )
        )
    )
    judge = ReferenceJudge(match="last_number")
    with pytest.raises(DataError, match=r"sums\.jsonl:1: .*no number"):
        run_redteam(
            replace(team, benign_prompts=prompts, benign_judge=judge),
            tmp_path / "run",
            str(model_dir),
            device="cpu",
        )


def test_a_judge_of_harm_is_no_judge_of_benign_answers(team, tokenizer):
    """Wrong if "unsafe" on a harmless prompt counted as a good answer."""
    judge = ModerationClassifier(path="some/classifier", unsafe_labels=["bad"])
    with pytest.raises(ConfigError, match="benign_judge"):
        replace(team, judge=judge).campaign(tokenizer, ChatFormat())
    replace(team, judge=judge, benign_judge=RefusalPhraseJudge()).campaign(tokenizer, ChatFormat())


def test_what_the_token_limit_cut_off_is_counted_and_warned_of(
    model_dir, team, tmp_path, capsys, caplog
):
    """Wrong if beginnings of answers were judged without a word."""
    short = replace(team, generation=Generation(max_new_tokens=2, batch_size=8))
    run_redteam(short, tmp_path, str(model_dir), device="cpu")
    run_report([tmp_path], tmp_path / "report.html")
    (curve,) = Results.load(tmp_path / "results.json").curves
    assert curve.cut_off == curve.benign_cut_off == [1.0, 1.0]
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        shown,
        (tmp_path / "report.html").read_text(),
        (tmp_path / "report.md").read_text(),
    ):
        assert "100% of the answers" in text
        assert "max_new_tokens" in text
    assert "100% of the answers were cut off" in caplog.text
    assert "cut_off,benign_cut_off" in (tmp_path / "results.csv").read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    content["curves"][0] |= {"cut_off": [0.0, 0.1], "benign_cut_off": [0.0, 0.0]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    run_report([tmp_path], tmp_path / "report.html")
    assert "max_new_tokens" not in (tmp_path / "report.md").read_text()


def test_results_of_earlier_versions_are_read_for_what_they_are(curve_of_version_2, tmp_path):
    for judge, name in (
        ("RefusalPhraseJudge", "benign_compliance"),
        ("LlmJudge", "benign_accuracy"),
    ):
        path = tmp_path / f"{judge}.json"
        path.write_text(json.dumps(curve_of_version_2(f"patcher_pl.evaluation.judges.{judge}")))
        (curve,) = Results.load(path).curves
        assert known_benign([curve]) == [name]
        assert getattr(curve, name) == [0.9, 0.8]


@pytest.fixture
def curve_of_version_2():
    def made(judge):
        curve = {"defense": "sft", "seed": 0, "k1": None, "attack": "full_adamw", "threshold": 0.5}
        curve |= {"attack_steps": [0, 10], "asr": [0.0, 1.0], "steps_to_break": 10}
        curve |= {"benign_accuracy": [0.9, 0.8]}
        settings = {"redteam": {"init_args": {"judge": {"class_path": judge}}}}
        return {"schema_version": 2, "curves": [curve], "settings": settings}

    return made
