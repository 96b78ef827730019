"""The `ablate` command: every estimator and every model once, whatever happens to the others."""

import json

import pytest
import yaml

from patcher_pl.reports.ablation import EstimatorComparison
from tests.commands import cli, patcher_settings, redteam_settings, write_yaml


def ablation_settings(**estimators):
    """Two attacks of one and two steps, and one hardened model."""
    adamw = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
    named = {"first-order": {"class_path": "patcher_pl.hypergradients.FirstOrder"}} | estimators
    every_step = {"model.init_args.refresh_every": 1, "control": True}
    adjoint = {"model.init_args.hypergradient": "patcher_pl.hypergradients.Adjoint"}
    return {
        "base": "base.yaml",
        "seeds": [4],
        "num_processes": 1,
        "trained": {"trainer.max_steps": 2, "redteam": None},
        "comparison": {
            "num_steps": [1, 2],
            "optimizers": {"adamw": adamw},
            "estimators": named,
            "trial_step": 1e-5,
        },
        "hardening": {
            "budgets": [14],
            "variants": {"first-order": {}, "exact": {**every_step, **adjoint}},
        },
    }


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch, fits_in_this_process):
    """A folder with the base configuration."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    settings = patcher_settings(inputs) | {"redteam": redteam_settings(inputs), "num_threads": 1}
    write_yaml(tmp_path / "base.yaml", settings)
    return tmp_path


def ablate(folder, settings):
    config = write_yaml(folder / "ablate.yaml", settings)
    return cli("ablate", "--config", config, "--run_dir", folder / "run")


def rows(folder):
    content = json.loads((folder / "run" / "ablation.json").read_text())
    return {
        (row["estimator"], row["num_steps"]): EstimatorComparison(**row)
        for row in content["comparisons"]
    }


@pytest.mark.long
def test_an_ablation_compares_and_hardens_and_goes_on_where_it_was(folder):
    unrolled = {"class_path": "patcher_pl.hypergradients.Unrolled"}
    settings = ablation_settings(unrolled=unrolled)
    settings["comparison"]["longest"] = {"unrolled": 1}
    ablate(folder, settings).expect(0)
    found = rows(folder)
    assert set(found) == {
        *(("exact", 1), ("exact", 2), ("first-order", 1), ("first-order", 2), ("unrolled", 1))
    }
    assert all(row.error is None for row in found.values())
    assert found["unrolled", 1].relative_error < 1e-3
    assert 0.5 < found["first-order", 2].cosine < 0.9999
    assert found["first-order", 2].gradient_evaluations == 3
    assert found["exact", 2].gradient_evaluations > 6
    assert found["exact", 2].time_s > 0
    for row in found.values():
        # The exact hypergradient is a derivative: it foresees what a tiny step does.
        if row.estimator != "first-order":
            assert row.actual_change == pytest.approx(row.predicted_change, rel=0.2)
        assert row.actual_change < 0

    content = json.loads((folder / "run" / "ablation.json").read_text())
    hardened = {row["variant"]: row for row in content["hardened"]}
    assert set(hardened) == {"first-order", "exact", "sft"}
    for variant in ("first-order", "exact"):
        # The budget is reached, and passed by less than the dearest step.
        assert 14 <= hardened[variant]["gradient_evaluations"] < 14 + 20
    assert hardened["sft"]["gradient_evaluations"] == hardened["exact"]["gradient_evaluations"]
    for name in ("cosine", "cost", "memory", "trial_step", "robustness"):
        assert (folder / "run" / f"{name}.png").stat().st_size > 10_000
    assert "| adamw | first-order |" in (folder / "run" / "tables.md").read_text()
    assert len(list((folder / "run" / "tensorboard").rglob("events.out.tfevents.*"))) == 4

    kept = [
        folder / "run" / "comparisons" / "adamw" / "k-2" / "seed-4" / "exact.json",
        folder / "run" / "hardened" / "exact" / "budget-14" / "seed-4" / "run.json",
        folder / "run" / "trained" / "run.json",
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    settings["comparison"]["estimators"]["implicit"] = {
        "class_path": "patcher_pl.hypergradients.Implicit"
    }
    ablate(folder, settings).expect(0)
    assert set(rows(folder)) == {*found, ("implicit", 1), ("implicit", 2)}
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.slow
def test_an_estimator_that_fails_is_a_row_with_its_error_and_is_tried_again(folder):
    """Wrong if one estimator that runs out of memory lost what all others found."""
    dying = {"class_path": "tests.estimators.Dying"}
    raising = {"class_path": "tests.estimators.Raising"}
    settings = ablation_settings(dying=dying, raising=raising)
    settings["comparison"]["num_steps"] = [1]
    del settings["hardening"]
    said = ablate(folder, settings)
    assert said.status == 2
    assert "2 measurements failed" in said.err
    found = rows(folder)
    assert "killed" in found["dying", 1].error
    assert found["raising", 1].error == "HypergradientError: no way"
    assert found["first-order", 1].cosine > 0.5
    assert "3 estimates, 1 done already." in ablate(folder, settings).out


def test_a_base_that_does_not_attack_is_refused(folder):
    settings = yaml.safe_load((folder / "base.yaml").read_text())
    arguments = settings["model"]["init_args"]
    settings["model"] = {
        "class_path": "patcher_pl.defenses.SFT",
        "init_args": {key: arguments[key] for key in ("language_model", "optimizer")},
    }
    write_yaml(folder / "base.yaml", settings)
    said = ablate(folder, ablation_settings() | {"model": str(folder)})
    assert said.status == 2
    assert "must train a Patcher against a FineTuningAttacker, got SFT" in said.err
