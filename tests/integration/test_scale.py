"""The `scale` command: one comparison per budget, an estimate before it, and nothing twice."""

import json

import pytest

from tests.commands import cli, patcher_settings, redteam_settings, sft_settings, write_yaml

LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch, fits_in_this_process):
    """A folder with two configurations of `fit` and a red team of two attacks."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    write_yaml(tmp_path / "sft.yaml", sft_settings(inputs) | {"num_threads": 1})
    write_yaml(tmp_path / "patcher.yaml", patcher_settings(inputs) | {"num_threads": 1})
    redteam = redteam_settings(inputs)
    (attack,) = redteam["attacks"]
    second = {**attack["init_args"], "label": "longer", "attack_steps": [0, 1, 3]}
    redteam["attacks"] = [attack, {**attack, "init_args": second}]
    write_yaml(tmp_path / "redteam.yaml", redteam)
    return tmp_path


def settings(**changes):
    return {
        "budgets": [12, 6],
        "seeds": [0, 1],
        "redteam": "redteam.yaml",
        "selection": {"redteam": "redteam.yaml", "num_trials": 1, "seeds": [9]},
        "defenses": {
            "sft": {"fit": "sft.yaml", "space": {LR: [1e-3]}},
            "mine": {"fit": "patcher.yaml", "min_budget": 10},
        },
    } | changes


def scale(folder, content, *options):
    config = write_yaml(folder / "scale.yaml", content)
    run_dir = ("--run_dir", folder / "run")
    return cli(
        "scale", "--config", config, *run_dir, "--engine=patcher_pl.jobs.InProcess", *options
    )


def test_a_dry_run_says_how_much_work_it_is_and_runs_nothing(folder):
    """Wrong if a study of many hours began without a word on how long it takes."""
    said = scale(folder, settings(), "--dry_run=true", "--engine=patcher_pl.jobs.InProcess").expect(
        0
    )
    out = " ".join(said.out.replace("\N{NO-BREAK SPACE}", " ").split())
    # SFT at both budgets, the other defense at the larger one: a trial and two models of each.
    assert "2 budgets, 9 runs of `fit`, 0 done already" in out
    training, attacks = 3 * (6 + 12 + 12), 9 * (2 + 3)
    assert f"{training + attacks} gradient evaluations, {training} of them training" in out
    assert "9 runs to do, about 0 h" in out
    assert "min with 1 process." in out
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["throughput.json"]
    found = json.loads((folder / "run" / "throughput.json").read_text())["throughput"]
    assert min(found["start_s"], found["evaluation_s"], found["measurement_s"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": {}}, "defenses: must name at least one defense"),
        ({"budgets": [6, 6]}, "budgets: must be different numbers of gradient evaluations >= 1"),
        ({"budgets": []}, "budgets: must be different numbers of gradient evaluations >= 1"),
        ({"seeds": [9]}, "must not be among selection.seeds, got [9] in both"),
        (
            {"defenses": {"sft": {"fit": "sft.yaml", "min_budget": 20}}},
            "budgets: no defense takes part at any of them",
        ),
    ],
)
def test_an_unfair_or_empty_study_is_refused(folder, changes, message):
    said = scale(folder, settings(**changes))
    assert said.status == 2
    assert message in said.err
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_study_makes_a_comparison_per_budget_and_goes_on_where_it_was(folder):
    scale(folder, settings(budgets=[6])).expect(0)
    run = folder / "run"
    first = [path.stat().st_mtime_ns for path in sorted(run.rglob("run.json"))]
    assert len(first) == 3
    took = [json.loads(path.read_text())["seconds"] for path in run.rglob("run.json")]
    assert min(took) > 0, "what later estimates rest on"

    said = scale(folder, settings()).expect(0)
    assert "9 runs of `fit`, 3 done already" in said.out
    kept = [path.stat().st_mtime_ns for path in sorted((run / "budget-6").rglob("run.json"))]
    assert kept == first
    content = json.loads((run / "scaling.json").read_text())
    assert {budget: len(own) for budget, own in content["trials"].items()} == {"6": 1, "12": 2}
    families = {"full_adamw", "longer", "worst case", "geometric mean"}
    found = {
        (one["defense"], one["budget"], one["seed"]) for one in content["unbounded"]["reaches"]
    }
    assert found == {
        *(("sft", budget, seed) for budget in (6, 12) for seed in (0, 1)),
        *(("mine", 12, seed) for seed in (0, 1)),
    }
    assert {one["family"] for one in content["unbounded"]["reaches"]} == families
    slopes = {
        (one["defense"], one["family"]): one["slope"] for one in content["unbounded"]["slopes"]
    }
    assert slopes["sft", "longer"] is not None
    assert slopes["mine", "longer"] is None, "one budget"
    for budget, own in content["costs"].items():
        for costs in own.values():
            assert all(cost["gradient_evaluations"] >= int(budget) for cost in costs)
    curves = json.loads((run / "results.json").read_text())["curves"]
    assert {(row["defense"], row["budget"]) for row in curves} == {
        ("sft (budget 6)", 6),
        ("sft (budget 12)", 12),
        ("mine (budget 12)", 12),
    }
    for name in ("scaling.csv", "scaling.md", "scaling.png", "scaling.svg", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert "SFT (budget 6)" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_defense_that_fails_at_a_budget_leaves_the_rest(folder):
    """Wrong if one setting that cannot run lost the study."""
    content = settings(budgets=[6], seeds=[0])
    content["defenses"]["broken"] = {"fit": "sft.yaml", "options": {"data.batch_size": 0}}
    said = scale(folder, content)
    assert said.status == 2
    assert "defenses.broken: every trial failed; the first left" in said.err
    assert "Everything else was done" in said.err
    content = json.loads((folder / "run" / "scaling.json").read_text())
    assert {one["defense"] for one in content["unbounded"]["reaches"]} == {"sft"}
    assert "every trial failed" in (folder / "run" / "scaling.md").read_text()
