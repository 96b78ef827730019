"""If these fail, the throughput benchmark compares different computations, or no longer runs."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from tests.commands import ROOT
from tools import bench_throughput as bench
from tools.throughput.sides import Setting
from tools.throughput.training import Alternation, measure_speed
from tools.throughput.workload import TINY, OwnWork, answer_lengths, conversations


def test_conversations_are_as_long_as_instruction_data():
    lengths = sorted(answer_lengths(2000, seed=0))
    assert 50 < lengths[1000] < 70
    assert lengths[-1] == 512
    made = conversations(50, TINY)
    assert all(one.labels[-1] == one.input_ids[-1] for one in made)
    assert all(set(one.labels) != {-100} and one.labels[0] == -100 for one in made)


@pytest.mark.parametrize("part", bench.TRAINING)
def test_both_sides_take_the_same_steps(part):
    """Every loss agrees, so that weights after every step do, to the rounding of float32."""
    setting = Setting(shape="tiny", num_conversations=40, our_attn="packed_sdpa")
    found = measure_speed(part, setting, num_rounds=2, block=2, num_warmup=1)
    assert len(found["losses"]["ours"]) == len(found["losses"]["plain"]) == found["num_steps"] == 5
    assert found["loss_difference"] < bench.LOSS_TOLERANCE
    assert len(found["wall_ratios"]) == len(found["cpu_ratios"]) == 2
    assert found["ours_tokens_per_second"] > 0


@pytest.mark.parametrize("our_dtype", [None, "bfloat16"])
def test_a_model_and_rows_of_ones_own(our_dtype):
    """Short weights on our side lose digits and nothing else: float32 copies take the steps."""
    own = OwnWork("testbed", "testbed/unsafe.jsonl")
    setting = Setting(own=own, our_dtype=our_dtype, our_attn="packed_sdpa")
    found = measure_speed("attacker", setting, num_rounds=1, block=3, num_warmup=1)
    assert own.build().num_parameters() == 89_600 and setting.examples == own.conversations()
    assert (found["loss_difference"] < bench.LOSS_TOLERANCE) == (our_dtype is None)
    assert found["loss_difference"] < 0.05


def test_losses_that_differ_would_be_seen(monkeypatch):
    """As they do where one side attacks with another vector."""
    monkeypatch.setattr("tools.throughput.sides.LR", 1e-3)
    setting = Setting(shape="tiny", num_conversations=40)
    plain = setting.plain("defender")
    plain.attack_vector = [1000 * change for change in plain.attack_vector]
    monkeypatch.setattr(Setting, "plain", lambda *_: plain)
    found = measure_speed("defender", setting, num_rounds=1, block=4, num_warmup=1)
    assert found["loss_difference"] > bench.LOSS_TOLERANCE


def test_blocks_alternate():
    order = []
    clock = Alternation(lambda: order.append("plain") or 1.0, num_warmup=1, block=2)
    for _ in range(5):
        order.append("ours")
        clock.after_step(1.0)
    assert order == [
        "ours",
        "plain",
        "ours",
        "ours",
        "plain",
        "plain",
        *["ours"] * 2,
        *["plain"] * 2,
    ]
    assert len(clock.wall_s["ours"]) == len(clock.wall_s["plain"]) == 2


def test_flops_are_those_of_the_mathematics():
    """By hand for one batch; the vocabulary counts for answer tokens only."""
    setting = Setting(shape="tiny", batch_size=1, num_conversations=1)
    (one,) = setting.examples
    length, answer = len(one.input_ids), sum(label != -100 for label in one.labels)
    model = TINY.build()
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.parameters()) - head
    attention = 12 * 2 * 16 * length * (length + 1) / 2
    expected = (6 * layers * length + 6 * head * answer + attention) / length
    assert setting.flops_per_token(3) == pytest.approx(expected)


SMALL = ["--shape", "tiny", "--rounds", "1", "--block", "1", "--warmup", "1", "--threads", "1"]


def assert_complete(report, part: str) -> None:
    names = ("peak_memory", "above_start_memory")
    assert set(report["ratios"]) == {
        *(f"{part}_step", f"{part}_step_cpu_time"),
        *(f"{name}_{part}" for name in names),
    }
    assert all(ratio > 0 for ratio in report["ratios"].values())
    assert report["environment"]["packages"]["torch"]
    assert report["settings"]["shape"] == "tiny"


def test_the_command_reports_ratios_and_the_machine(tmp_path, monkeypatch, capsys):
    """Its processes in this one, which saves their imports."""

    def in_this_process(work, options):
        out = tmp_path / "measured.json"
        bench.run_job({"work": work, "options": vars(options), "out": str(out)})
        return json.loads(out.read_text())

    monkeypatch.setattr(bench, "in_own_process", in_this_process)
    sizes = itertools.count(1.0)
    monkeypatch.setattr("tools.throughput.training._status", lambda _: next(sizes))
    out = tmp_path / "bench.json"
    command = [*SMALL, "--memory_steps", "1", "--only", "defender", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_throughput.py", *command])
    bench.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert_complete(report, "defender")


@pytest.mark.slow
def test_every_measurement_has_its_own_process():
    command = [sys.executable, str(ROOT / "tools" / "bench_throughput.py"), *SMALL]
    done = subprocess.run([*command, "--only", "attacker"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_complete(json.loads(done.stdout.splitlines()[-1]), "attacker")


def test_profiles_are_written(tmp_path):
    from tools.throughput.training import profile

    table = profile("attacker", Setting(shape="tiny", num_conversations=8), 1, tmp_path)
    assert "aten::mm" in table
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "operators.txt").read_text().startswith("-")
    assert torch.is_grad_enabled()
