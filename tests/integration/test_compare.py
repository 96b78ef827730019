"""The `compare` command: equal searches, equal budgets, and nothing twice."""

import json

import pytest

from patcher_pl.comparison import Contender, Selection
from patcher_pl.comparison.trials import plan_trials
from patcher_pl.jobs import Fit
from tests.commands import cli, patcher_settings, redteam_settings, sft_settings, write_yaml

LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch, fits_in_this_process):
    """A folder with two configurations of `fit` and a red team."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    write_yaml(tmp_path / "sft.yaml", sft_settings(inputs) | {"num_threads": 1})
    write_yaml(tmp_path / "patcher.yaml", patcher_settings(inputs) | {"num_threads": 1})
    write_yaml(tmp_path / "redteam.yaml", redteam_settings(inputs))
    return tmp_path


def settings(**changes):
    return {
        "max_gradient_evaluations": 6,
        "seeds": [0],
        "redteam": "redteam.yaml",
        "selection": {"redteam": "redteam.yaml", "num_trials": 2, "seeds": [9]},
        "defenses": {
            "sft": {"fit": "sft.yaml", "space": {LR: [1e-3, 1e-2]}},
            "mine": {"fit": "patcher.yaml", "space": {"model.init_args.alpha": [0.5, 0.7]}},
        },
    } | changes


def compare(folder, content, *options):
    config = write_yaml(folder / "compare.yaml", content)
    return cli("compare", "--config", config, "--run_dir", folder / "run", *options)


def test_a_comparison_searches_trains_attacks_reports_and_goes_on_where_it_was(folder):
    said = compare(folder, settings()).expect(0)
    run = folder / "run"
    content = json.loads((run / "comparison.json").read_text())
    trials = [
        (row["defense"], row["number"], *row["options"].values()) for row in content["trials"]
    ]
    assert trials == [("sft", 0, 1e-3), ("sft", 1, 1e-2), ("mine", 0, 0.5), ("mine", 1, 0.7)]
    assert all(row["gradient_evaluations"] >= 6 for row in content["trials"])
    chosen = {row["defense"]: row["options"] for row in content["trials"] if row["is_chosen"]}
    assert set(chosen) == {"sft", "mine"}
    for name, options in chosen.items():
        # The model of the comparison was trained with what was chosen.
        (option, value), log = (
            next(iter(options.items())),
            run / "models" / name / "seed-0" / "config.yaml",
        )
        assert f"{option.rpartition('.')[2]}: {value}" in log.read_text()
        (cost,) = content["costs"][name]
        assert 6 <= cost["gradient_evaluations"] < 6 + 5
    curves = json.loads((run / "results.json").read_text())["curves"]
    assert [(row["defense"], row["train_seed"], row["seed"]) for row in curves] == [
        ("sft", 0, 0),
        ("mine", 0, 0),
    ]
    assert "| Mine, k1 = 2 |" in (run / "comparison.md").read_text()
    assert "Defenses on equal terms" in (run / "report.html").read_text()
    assert "Comparison" in said.out
    # Six steps do not make a model that refuses.
    assert "sft: no trial left a usable model" in said.out + said.err

    kept = [path.stat().st_mtime_ns for path in sorted(run.rglob("run.json"))]
    assert len(kept) == 6
    said = compare(folder, settings()).expect(0)
    assert "4 runs, 4 done already" in said.out
    assert "2 runs, 2 done already" in said.out
    assert [path.stat().st_mtime_ns for path in sorted(run.rglob("run.json"))] == kept


def test_a_red_team_that_changed_makes_another_run(folder):
    """Wrong if results of an earlier red team stood for those of the new one."""

    def planned():
        options = {"redteam": folder / "redteam.yaml"}
        return Fit.plan(folder / "run", folder / "sft.yaml", options).digest

    before = planned()
    assert planned() == before
    changed = (folder / "redteam.yaml").read_text().replace("limit: 3", "limit: 2")
    (folder / "redteam.yaml").write_text(changed)
    assert planned() != before


@pytest.mark.slow
def test_a_trial_that_fails_is_passed_over(folder):
    """Wrong if one setting that cannot run lost the whole search."""
    content = settings()
    del content["defenses"]["mine"]
    content["defenses"]["sft"]["space"] = {"data.batch_size": [0, 2]}
    said = compare(folder, content).expect(0)
    first, second = json.loads((folder / "run" / "comparison.json").read_text())["trials"]
    assert "trial-0/seed-9/log.txt" in first["error"]
    assert second["is_chosen"]
    assert f"sft, trial 0: {first['error']}\n" in said.out

    content["defenses"]["sft"]["space"] = {"data.batch_size": [0, -1]}
    said = compare(folder, content)
    assert said.status == 2
    assert "defenses.sft: every trial failed; the first left" in said.err


def test_options_of_a_trial_go_before_those_of_a_defense_before_common_ones(folder):
    """Wrong if what was searched, or set for one defense, were undone by what is set for all."""
    redteam = folder / "redteam.yaml"
    contender = Contender(fit=folder / "sft.yaml", space={"a": [1]}, options={"a": 2, "b": 2})
    selection = Selection(redteam=redteam, num_trials=1, seeds=[9])
    common = {"a": 3, "b": 3, "c": 3}
    (trial,) = plan_trials({"sft": contender}, selection, common, folder)["sft"]
    given = trial.fits[0].arguments
    assert {"--a=1", "--b=2", "--c=3", "--seed_everything=9"} <= set(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": {}}, "defenses: must name at least one defense"),
        ({"seeds": [9]}, r"must not be among selection.seeds, got [9] in both"),
        (
            {"defenses": {"sft": {"fit": "sft.yaml", "space": {LR: [1]}}}},
            "defenses.sft.space: has 1 points for 2 trials",
        ),
        ({"defenses": {"sft": {"fit": "gone.yaml"}}}, "gone.yaml"),
    ],
)
def test_an_unfair_or_impossible_comparison_is_refused(folder, changes, message):
    said = compare(folder, settings(**changes))
    assert said.status == 2
    assert message in said.err
    assert not (folder / "run").exists()
