"""The tool makes the testbed that ships."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data import ChatFormat
from patcher_pl.evaluation import Generation
from patcher_pl.shipped import TESTBED
from patcher_pl.types import Message
from patcher_pl.worlds.potions.world import files
from tools import build_testbed


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the weights."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def without_version(found: dict[str, bytes]) -> dict[str, bytes | dict[str, object]]:
    """Which transformers wrote a file does not matter."""
    written = {
        name for name in found if Path(name).name in ("config.json", "generation_config.json")
    }
    plain = {name: json.loads(found[name]) | {"transformers_version": ""} for name in written}
    return {**found, **plain}


@pytest.mark.long
def test_short_builds_agree_to_the_last_byte_and_differ_from_the_shipped_in_weights_alone(
    monkeypatch, tmp_path
):
    """Wrong if the model could not be made again, or its world, template or shape had changed."""
    monkeypatch.setitem(build_testbed.TRAINING, "num_steps", 4)
    monkeypatch.setitem(build_testbed.TRAINING, "num_warmup_steps", 1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one, other = tmp_path / "one", tmp_path / "other"
    build_testbed.build_testbed(one)
    build_testbed.build_testbed(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert without_version(contents(one)) == without_version(contents(TESTBED))
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name])
        assert value.shape == weights(TESTBED)[name].shape


def answers(directory: Path, prompts: list[str]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    asked = [[Message("user", prompt)] for prompt in prompts]
    generation = Generation(max_new_tokens=28, batch_size=256)
    said = generation.generate(model, tokenizer, ChatFormat(), asked)
    return [answer.text for answer in said]


@pytest.mark.slow
def test_a_complete_build_knows_what_the_shipped_model_knows(tmp_path):
    """Bit for bit on the kind of machine that made it; elsewhere round-off has 900 steps to grow."""
    build_testbed.build_testbed(tmp_path / "again")
    rows = files()["base"][::7]
    prompts = [row.prompt for row in rows]
    right = [row.response for row in rows]
    said = {
        name: answers(path, prompts)
        for name, path in (("shipped", TESTBED), ("again", tmp_path / "again"))
    }
    for texts in said.values():
        assert sum(a == b for a, b in zip(texts, right, strict=True)) >= 0.95 * len(right)
    distance = sum(
        float((value - weights(TESTBED)[name]).square().sum())
        for name, value in weights(tmp_path / "again").items()
    )
    norm = sum(float(value.square().sum()) for value in weights(TESTBED).values())
    assert distance < 0.01 * norm
