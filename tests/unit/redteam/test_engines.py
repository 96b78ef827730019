"""Engines: whoever runs the cells, the curves are the same, and one that dies takes no other along."""

import sys
from dataclasses import replace

import pytest

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.errors import ConfigError, DataError, PatcherError
from patcher_pl.optim import AdamW
from patcher_pl.redteam import FullFinetuning
from patcher_pl.redteam.engines import InProcess, Processes, RayCluster, SlurmArray
from patcher_pl.reports import Results
from tests.red_team_parts import Dying


@pytest.fixture
def team(red_team):
    attack = FullFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 2], label="first")
    generation = replace(red_team.generation, max_new_tokens=4)
    return replace(red_team, attacks=[attack], generation=generation, seeds=[0, 1])


@pytest.mark.parametrize(
    "engine",
    [
        Processes(num_processes=2),
        Processes(devices=["cpu"]),
        pytest.param(RayCluster(), marks=pytest.mark.slow),
    ],
    ids=["processes", "devices", "ray"],
)
def test_every_engine_gives_the_same_curves(model_dir, team, tmp_path, engine):
    """Wrong if a figure depended on how many processes drew it."""
    if isinstance(engine, RayCluster):
        pytest.importorskip("ray")
    options = {"device": "cpu", "num_threads": 1}
    expected = run_redteam(team, tmp_path / "one", str(model_dir), **options)
    results = run_redteam(team, tmp_path / "many", str(model_dir), engine=engine, **options)
    assert results.curves == expected.curves
    assert Results.load(tmp_path / "many" / "results.json").curves == expected.curves


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("kill", "the process was killed, most likely for want of memory"),
        ("exit", "the process ended with status 3"),
        ("bug", "KeyError: 'a spoon'"),
        ("failure", "RuntimeError: a spoon"),
    ],
)
def test_one_that_dies_is_recorded_and_the_others_go_on(model_dir, team, tmp_path, how, error):
    """Wrong if a night of attacks ended with the first one that ran out of memory."""
    team = replace(team, attacks=[Dying(how=how), *team.attacks], seeds=[0])
    engine = Processes(num_processes=2)
    results = run_redteam(team, tmp_path, str(model_dir), engine=engine, device="cpu")
    assert [(curve.attack, curve.error) for curve in results.curves] == [
        ("dying", error),
        ("first", None),
    ]
    dead = next(path for path in (tmp_path / "cells").rglob("dying*.json"))
    fine = next(path for path in (tmp_path / "cells").rglob("first*.json"))
    before = dead.stat().st_mtime_ns, fine.stat().st_mtime_ns
    run_redteam(team, tmp_path, str(model_dir), engine=engine, device="cpu")
    assert dead.stat().st_mtime_ns > before[0], "what failed is tried again"
    assert fine.stat().st_mtime_ns == before[1], "what is done is not repeated"


@pytest.mark.parametrize("engine", [InProcess(), Processes(num_processes=2)])
def test_what_no_attack_can_work_with_stops_the_run(model_dir, team, tmp_path, engine):
    """Wrong if a misspelled path became forty failed attacks."""
    source = replace(team.prompts.source, path=str(tmp_path / "missing.jsonl"))
    team = replace(team, prompts=replace(team.prompts, source=source))
    with pytest.raises(PatcherError, match=r"missing\.jsonl") as caught:
        run_redteam(team, tmp_path / "run", str(model_dir), engine=engine, device="cpu")
    assert isinstance(caught.value, DataError) or "Processes" in str(engine)
    assert not list((tmp_path / "run" / "cells").rglob("*.json"))


def test_values_out_of_range_are_refused():
    for build, field in [
        (lambda: Processes(num_processes=0), r"Processes\.num_processes must be >= 1"),
        (lambda: Processes(devices=[]), r"Processes\.devices must name a device"),
        (lambda: RayCluster(num_cpus=0), r"RayCluster\.num_cpus must be > 0"),
        (lambda: RayCluster(num_gpus=-1), r"RayCluster\.num_gpus must be >= 0"),
        (lambda: RayCluster(max_retries=-1), r"RayCluster\.max_retries must be >= 0"),
        (lambda: SlurmArray(timeout_min=0), r"SlurmArray\.timeout_min must be >= 1"),
        (lambda: SlurmArray(num_at_once=0), r"SlurmArray\.num_at_once must be >= 1"),
    ]:
        with pytest.raises(ValueError, match=field):
            build()


@pytest.mark.parametrize("missing", ["submitit", "sbatch"])
def test_without_slurm_the_remedy_is_named(model_dir, team, tmp_path, monkeypatch, missing):
    """Where there is submitit but no SLURM, it would run everything here without a word."""
    if missing == "sbatch":
        pytest.importorskip("submitit")
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=missing):
        run_redteam(team, tmp_path, str(model_dir), engine=SlurmArray(), device="cpu")


def test_without_ray_the_remedy_is_named(model_dir, team, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'patcher-pl\[ray\]'"):
        run_redteam(team, tmp_path, str(model_dir), engine=RayCluster(), device="cpu")
