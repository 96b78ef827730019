"""A red team of two processes that hold the model together finds what one process finds."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.commands import ROOT, command_line, write_inputs, write_yaml

pytestmark = pytest.mark.long

ADAMW = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-2}}


def attack(name: str, batch_size: int = 4, **settings: Any) -> dict[str, Any]:
    steps = {"optimizer": ADAMW, "attack_steps": [0, 3, 6], "batch_size": batch_size}
    return {"class_path": f"patcher_pl.redteam.{name}", "init_args": {**steps, **settings}}


# Batches that two processes cannot halve, and one that leaves the second without a row.
FULL = attack("FullFinetuning", batch_size=3, max_grad_norm=1.0)
OTHERS = [
    attack("BenignFinetuning", batch_size=1),
    attack("LoraFinetuning", lora={"rank": 2}, max_grad_norm=0.5),
    attack("EmbeddingFinetuning"),
    attack("RestartedFinetuning", restart_every=2, schedule="cosine", num_warmup_steps=1),
    attack("VectorOutrunning", num_simulated_steps=2),
    attack("SoftPrompt", tokens=["~", "^"]),
    attack("BenignThenHarmful", num_benign_steps=2),
    attack("MultiTurnFinetuning"),
    {"class_path": "patcher_pl.redteam.Jailbreak", "init_args": {"asking": {"prefill": "Stir"}}},
    {"class_path": "patcher_pl.redteam.Abliteration", "init_args": {"num_prompts": 4}},
    {"class_path": "patcher_pl.redteam.DeltaStrip", "init_args": {"kept": 0.3, "then": FULL}},
]


def settings(inputs: Path, model: Path, *attacks: dict[str, Any]) -> dict[str, Any]:
    unsafe = {"path": str(inputs / "unsafe.jsonl"), "harmful": True}
    safe = {"path": str(inputs / "safe.jsonl")}
    perplexity = {
        "class_path": "patcher_pl.evaluation.utility.Perplexity",
        "init_args": {"data": {"source": safe, "limit": 5}, "batch_size": 2},
    }
    return {
        "model": str(model),
        "sibling": sibling_of(model, inputs),
        "dtype": "float64",
        "device": "cpu",
        "redteam": {
            "attacks": list(attacks),
            "data": {"sources": [unsafe, safe], "poison_ratio": 0.5},
            "prompts": {"source": unsafe, "limit": 3},
            "benign_prompts": {"source": safe, "limit": 4},
            "judge": {"class_path": "patcher_pl.worlds.potions.RecipeJudge"},
            "generation": {"max_new_tokens": 8, "batch_size": 2},
            "utility": [perplexity],
            "num_samples": 3,
            "overlap": "allow",
        },
    }


def sibling_of(model: Path, inputs: Path) -> str:
    """A model of the same architecture with other weights."""
    folder = inputs / f"sibling-{model.name}"
    if not folder.is_dir():
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(model)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def together(
    config: Path,
    run_dir: Path,
    *options: str,
    program: Sequence[str] = ("-m", "patcher_pl"),
    num_processes: int = 2,
) -> subprocess.CompletedProcess:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    torchrun = (*torchrun, f"--nproc-per-node={num_processes}")
    command = (*torchrun, *program, "redteam", "--config", config, "--run_dir", run_dir)
    return subprocess.run(
        [str(part) for part in (*command, *options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def alone(config: Path, run_dir: Path) -> None:
    command = command_line("redteam", "--config", config, "--run_dir", run_dir)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)


def curves(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "results.json").read_text())["curves"]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["error"] is None
        pairs = zip(one.pop("utility")["perplexity"], other["utility"]["perplexity"], strict=True)
        for measured, reference in pairs:
            assert measured == reference or math.isclose(measured, reference, rel_tol=1e-9)
        assert one == {name: value for name, value in other.items() if name != "utility"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def tied(gpt2, tmp_path):
    """A model whose output head is its embeddings, and whose matrices lie the other way round."""
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    # Dropout draws other numbers on every process.
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    return folder


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_two_processes_find_what_one_finds(request, inputs, tmp_path, family):
    """Every attack in float64: the same answers, tokens and costs, and weights that fit the same."""
    model = request.getfixturevalue(family)
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, model, FULL, *OTHERS))
    first = write_yaml(tmp_path / "first.yaml", settings(inputs, model, FULL))
    alone(first, tmp_path / "two")
    (cell,) = (tmp_path / "two" / "cells").rglob("*.json")
    finished = cell.stat().st_mtime_ns
    alone(config, tmp_path / "one")
    said = together(config, tmp_path / "two")
    assert said.returncode == 0, said.stderr[-6000:]
    assert cell.stat().st_mtime_ns == finished, "what one process has done is not repeated by two"
    assert_same(curves(tmp_path / "two"), curves(tmp_path / "one"))
    answers = [curve["samples"] for curve in curves(tmp_path / "one")]
    assert len({json.dumps(one) for one in answers}) > len(OTHERS) - 2, "attacks change answers"


def test_answers_over_shards_are_the_same(llama, inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, llama, FULL, OTHERS[1]))
    alone(config, tmp_path / "one")
    said = together(config, tmp_path / "two", "--sharding.answers", "shards")
    assert said.returncode == 0, said.stderr[-6000:]
    assert_same(curves(tmp_path / "two"), curves(tmp_path / "one"))


@pytest.mark.slow
def test_copies_of_two_processes_each_find_what_one_finds(llama, inputs, tmp_path):
    """Four processes; each copy's attack would be another one if it did not see all rows."""
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, llama, FULL, *OTHERS))
    alone(config, tmp_path / "one")
    said = together(config, tmp_path / "four", "--sharding.num_replicas", "2", num_processes=4)
    assert said.returncode == 0, said.stderr[-6000:]
    assert_same(curves(tmp_path / "four"), curves(tmp_path / "one"))


@pytest.mark.slow
def test_what_fails_on_one_process_ends_the_run_and_is_told(llama, inputs, tmp_path):
    """Wrong if the others waited forever, or what was done before were lost."""
    fails = {"class_path": "tests.distributed.one_sided.FailsOnTheSecond"}
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, llama, FULL, fails))
    said = together(config, tmp_path / "run")
    assert said.returncode != 0
    assert "failed on process 1 of 2 (RuntimeError: out of memory)" in said.stderr
    cells = {
        path.name.split("-seed")[0]: json.loads(path.read_text())["curve"]
        for path in (tmp_path / "run" / "cells").rglob("*.json")
    }
    assert cells["full_adamw"]["error"] is None
    assert cells["fails"]["error"] == "RuntimeError: out of memory"


@pytest.mark.slow
def test_a_process_that_lacks_a_file_ends_the_run(llama, inputs, tmp_path):
    """Wrong if the others waited for it in the first attack, as on a machine without the data."""
    chosen = settings(inputs, llama, FULL)
    chosen["redteam"]["prompts"]["source"]["path"] = "asked.jsonl"
    config = write_yaml(tmp_path / "config.yaml", chosen)
    for rank in range(2):
        (tmp_path / f"machine-{rank}").mkdir()
    shutil.copy(inputs / "unsafe.jsonl", tmp_path / "machine-0" / "asked.jsonl")
    start = tmp_path / "start.py"
    start.write_text(
        "import os\n"
        f"os.chdir('{tmp_path}/machine-' + os.environ['RANK'])\n"
        "from patcher_pl.cli.main import main\n"
        "raise SystemExit(main())\n"
    )
    said = together(config, tmp_path / "run", program=(str(start),))
    assert said.returncode != 0
    assert "Process 1 of 2 cannot go on" in said.stderr
    assert "asked.jsonl" in said.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "patcher_pl.jobs.Processes"), "a launcher has started attack together"),
        (("--device", "cuda:0"), "cuda:0"),
    ],
)
@pytest.mark.slow
def test_what_several_processes_cannot_do_is_refused(llama, inputs, tmp_path, options, message):
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, llama, FULL))
    said = together(config, tmp_path / "run", *options)
    assert said.returncode != 0
    assert message in said.stderr
