"""Several runs come together without one hiding another."""

import json

import pytest

from patcher_pl.errors import DataError
from patcher_pl.reports import Results
from patcher_pl.reports.grouping import group_curves
from patcher_pl.reports.runs import load_runs, merge_runs


def save(folder, *curves):
    Results(curves=list(curves), environment={}).save(folder / "results.json")
    return folder


def test_files_directories_and_directories_of_runs_are_read(tmp_path, curve):
    save(tmp_path / "runs" / "a", curve("sft", None, [0], None))
    save(tmp_path / "runs" / "b", curve("tar", None, [0], None))
    runs = load_runs([tmp_path / "runs"])
    assert [run.name for run in runs] == ["a", "b"]
    again = load_runs([tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "results.json"])
    assert len(again) == 1, "named twice, read once"
    other = tmp_path / "runs" / "theirs.json"
    other.write_text(json.dumps({"curves": []}))
    assert [run.name for run in load_runs([other])] == ["theirs"]


def test_names_are_long_enough_to_differ(tmp_path, curve):
    for name in ("x/seed-0", "y/seed-0"):
        save(tmp_path / name, curve("sft", None, [0], None))
    assert [run.name for run in load_runs([tmp_path])] == ["x/seed-0", "y/seed-0"]


def test_other_curves_of_the_same_defense_are_kept_apart(tmp_path, curve):
    """Wrong if two models called `model` were averaged, or one of them lost."""
    seed = curve("model", None, [0, 1], 20, seed=1)
    save(tmp_path / "a", curve("model", None, [0, 1], 20), seed, curve("sft", None, [1], 0))
    same = curve("model", None, [0], None, attack="other")
    save(tmp_path / "b", curve("model", None, [0, 0], None), same, curve("sft", None, [1], 0))
    save(tmp_path / "c", same)
    curves, notes = merge_runs(load_runs([tmp_path]))
    apart = ["model (a)", "model (a)", "model (b)", "model (b)", "model (c)"]
    assert sorted(one.defense for one in curves) == [*apart, "sft"]
    assert len(notes) == 1
    labels = {group.label for group in group_curves([curve("sft (a)", None, [0], None)])}
    assert labels == {"SFT (a)"}
    assert "'model'" in notes[0]


def test_runs_that_measured_differently_are_said_to(tmp_path, curve):
    save(tmp_path / "a", curve("sft", None, [0], None, num_prompts=8))
    save(tmp_path / "b", curve("tar", None, [0], None, num_prompts=9, threshold=0.2))
    _, notes = merge_runs(load_runs([tmp_path]))
    assert any("thresholds" in note and "0.2, 0.5" in note for note in notes)
    assert any("numbers of harmful prompts: 8, 9" in note for note in notes)


def test_a_place_without_results_is_named(tmp_path):
    with pytest.raises(DataError, match=r"neither this directory nor one below it"):
        load_runs([tmp_path])
    with pytest.raises(DataError, match=r"nothing: no results could be read"):
        load_runs([tmp_path / "nothing"])
