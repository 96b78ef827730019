"""If these fail, minutes on a GPU are spent and tell nothing: a fault of one part takes the others along."""

import json

import pytest

from tools.gpu_check.__main__ import ASIDE, FIRST, LAST, TOGETHER, Check, parts_of
from tools.gpu_check.processes import Clock, PartError, run


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path, tmp_path / "runs", 100.0, toy=True)


def broken():
    raise RuntimeError("no such kernel")


def test_a_part_that_fails_is_an_entry_and_the_others_go_on(check, capsys):
    check.part("first", broken)
    check.part("second", lambda: {"tokens_per_second": 1.0})
    report = json.loads((check.out / "report.json").read_text())
    assert report["first"] == {"failed": "RuntimeError: no such kernel"}
    assert report["second"] == {"tokens_per_second": 1.0}
    assert "no such kernel" in capsys.readouterr().out


def test_a_process_that_takes_too_long_is_ended_with_what_it_said(tmp_path):
    code = "import sys, time; print('begun', flush=True); time.sleep(600)"
    with pytest.raises(PartError, match=r"longer than 2 s: begun"):
        run(["-c", code], tmp_path / "log", 2)
    with pytest.raises(PartError, match=r"exit status 3"):
        run(["-c", "raise SystemExit(3)"], tmp_path / "log", 60)


def test_no_part_outlasts_the_whole():
    assert Clock.of(0).left(10) == 0
    assert Clock.of(1000).left(10) == 10


@pytest.mark.long
def test_variants_are_measured_and_one_that_cannot_run_is_said(check):
    """Liger's kernels need a GPU; the variants before and after it do not."""
    chosen = [
        ("attacker", "plain loop", {}),
        ("attacker", "packed, Liger", {}),
        ("defender", "packed", {}),
    ]
    rows = check.speed("qwen2.5-7b", 4, chosen, 100)["rows"]
    assert [row["name"] for row in rows] == [name for _, name, _ in chosen]
    assert "Liger" in rows[1]["failed"]
    assert all(row["tokens_per_second"] > 0 for row in (rows[0], rows[2]))
    assert rows[0]["losses"][0] == pytest.approx(rows[2]["losses"][0], rel=1e-3)


def test_every_part_is_run(check):
    assert sorted((*ASIDE, *FIRST, *TOGETHER, *LAST)) == sorted(parts_of(check))
