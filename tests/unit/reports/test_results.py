"""`results.json`: its field names are an interface, and a broken file is said to be one."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest

from patcher_pl.errors import DataError
from patcher_pl.reports import Curve, Results, Sample, to_markdown
from patcher_pl.reports.grouping import group_curves
from patcher_pl.reports.results import finite


def test_what_is_saved_is_what_is_loaded(tmp_path, curve):
    full = curve(
        "patcher",
        40,
        [0.0, 0.75, None],
        20,
        train_seed=3,
        asr_low=[0.0, 0.5, None],
        asr_high=[0.1, 0.9, None],
        coherent=[1.0, 1.0, None],
        num_prompts=8,
        num_benign_prompts=4,
        judge_errors=[0, 0, 8],
        attack_tokens=[0, 200, 400],
        samples=[Sample(attack_steps=20, prompt="How hot?", answer="Grün \u2615", score=5)],
        error="RuntimeError: out of memory",
    )
    results = Results(
        curves=[full], environment={"python": "3"}, settings={"a": [1]}, fingerprint="f"
    )
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_the_field_names_are_those_that_others_read(tmp_path, curve):
    Results(curves=[curve("sft", None, [0, 1], 20)], environment={"python": "3"}).save(
        tmp_path / "results.json"
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["schema_version"] == 3
    assert written["environment"] == {"python": "3"}
    assert (
        written["curves"][0].items()
        >= {
            "defense": "sft",
            "seed": 0,
            "k1": None,
            "attack": "full_adamw",
            "attack_steps": [0, 20],
            "asr": [0, 1],
            "benign_accuracy": [1.0, 1.0],
            "steps_to_break": 20,
        }.items()
    )


def test_nan_becomes_null(tmp_path, curve):
    Results(curves=[curve("sft", None, [0, math.nan], None)], environment={}).save(
        tmp_path / "results.json"
    )
    loaded = Results.load(tmp_path / "results.json").curves[0]
    assert loaded.asr == [0, None]
    assert finite(math.nan) is None
    assert finite(0.0) == 0.0


def test_a_minimal_file_and_unknown_entries_are_read(tmp_path, curve):
    """Wrong if a later version could not add an entry without breaking this one."""
    entry = asdict(curve("sft", None, [0, 1], 20))
    minimal = {key: entry[key] for key in list(entry)[:9]} | {"mood": "calm"}
    (tmp_path / "r.json").write_text(json.dumps({"curves": [minimal], "weather": "fine"}))
    assert Results.load(tmp_path / "r.json").curves == [curve("sft", None, [0, 1], 20)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ('{"curves": [', "not JSON"),
        ("[1]", "no list `curves`"),
        ('{"curves": {}}', "no list `curves`"),
        ('{"curves": [3]}', r"curves\[0\]"),
        ('{"curves": [{"defense": "sft"}]}', r"curves\[0\] lacks 'seed'"),
        ('{"curves": [], "schema_version": 99}', "Update patcher_pl"),
    ],
)
def test_a_broken_file_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=rf"results\.json: .*{reason}"):
        Results.load(tmp_path / "results.json")


def test_lists_of_different_length_are_refused(tmp_path, curve):
    entry = asdict(curve("sft", None, [0, 1], 20)) | {"asr": [0]}
    (tmp_path / "results.json").write_text(json.dumps({"curves": [entry]}))
    with pytest.raises(DataError, match="asr has 1 entries, attack_steps 2"):
        Results.load(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": [[5]]}, "scores has 1 entries, attack_steps 2"),
        ({"scores": [[5], [5, 1]]}, "scores must have as many prompts at every measurement"),
        ({"collapsed": [True]}, "collapsed has 1 entries"),
        ({"attack_flops": [1.0, 2.0, 3.0]}, "attack_flops has 3 entries"),
        ({"utility": {"perplexity": [1.0]}}, "utility.perplexity has 1 entries"),
        ({"judge_errors": [0]}, "judge_errors has 1 entries"),
        ({"asr": [0, 37.5]}, "asr must be in 0..1, got 37.5"),
        ({"attack_steps": [20, 0]}, "attack_steps must ascend"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, curve, changes, reason):
    """Wrong if a rate were read at another measurement than it was taken at."""
    entry = asdict(curve("sft", None, [0, 1], 20)) | changes
    (tmp_path / "results.json").write_text(json.dumps({"curves": [entry]}))
    with pytest.raises(DataError, match=f"curves.0.: {reason}"):
        Results.load(tmp_path / "results.json")


def test_files_of_the_first_version_are_read(tmp_path, curve):
    entry = asdict(curve("sft", None, [0, 1], 20))
    old = {name: value for name, value in entry.items() if name in list(entry)[:19]}
    assert list(old)[-1] == "error"
    content = {"curves": [old], "environment": {}, "schema_version": 1}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert Results.load(tmp_path / "results.json").curves == [curve("sft", None, [0, 1], 20)]


def test_nan_in_a_file_is_read_as_not_scored(tmp_path, curve):
    entry = asdict(curve("sft", None, [0, 1], 20)) | {"asr": [0, math.nan]}
    (tmp_path / "results.json").write_text(json.dumps({"curves": [entry]}))
    assert Results.load(tmp_path / "results.json").curves[0].asr == [0, None]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: no results could be read"):
        Results.load(tmp_path / "nothing.json")


def test_keys_tell_curves_apart(curve):
    plain = curve("patcher", 40, [0], None)
    others = [
        curve("sft", 40, [0], None),
        curve("patcher", 2, [0], None),
        curve("patcher", 40, [0], None, seed=1),
        curve("patcher", 40, [0], None, attack="lora_adamw"),
        curve("patcher", 40, [0], None, train_seed=1),
    ]
    assert plain.key not in {other.key for other in others}
    assert isinstance(plain, Curve)


def test_reports_load_neither_torch_nor_lightning():
    """Wrong if drawing a figure from a file took seconds and a gigabyte."""
    code = (
        "import sys, patcher_pl.reports; "
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib', 'numpy'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_skipped_steps_count_as_the_last_measurement(curve):
    """Wrong if the mean over seeds after a break were that of the models which held."""
    broken = curve(
        "sft", None, [0, 0.75], 20, attack_tokens=[0, 100], skipped_steps=[40, 80], seed=1
    )
    whole = broken.completed()
    assert whole.attack_steps == [0, 20, 40, 80]
    assert whole.asr == [0, 0.75, 0.75, 0.75]
    assert whole.attack_tokens == [0, 100, 200, 400]
    assert whole.completed() == whole
    held = curve("sft", None, [0, 0, 0, 0.25], None)
    assert held.completed() is held
    (group,) = group_curves([held, broken])
    assert list(group.over_seeds("asr")["mean"]) == [0, 0.375, 0.375, 0.5]
    assert group.steps_to_break == "20 to > 80"
    assert "1 of 2 attacks ended once the model was broken" in to_markdown([held, broken])


def test_skipped_steps_come_after_the_measured_ones(curve):
    content = asdict(curve("sft", None, [0, 0.75], 20)) | {"skipped_steps": [20]}
    with pytest.raises(ValueError, match=r"skipped_steps must ascend from \[20\], got \[20\]"):
        Curve.from_json(content)
