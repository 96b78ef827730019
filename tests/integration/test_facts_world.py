"""The facts world on a real chat model: minutes of work, and a model that has to be had, so only with `pytest -m slow`."""

import json
from pathlib import Path

import pytest

from patcher_pl.data import Source
from patcher_pl.errors import ConfigError
from patcher_pl.worlds.base import FILES
from patcher_pl.worlds.facts.world import FactsWorld
from tests.commands import ROOT
from tools.get_model import get_model

MODEL = ROOT / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, from this checkout or freshly got."""
    if (MODEL / "config.json").is_file():
        return MODEL
    pytest.importorskip("gguf")
    directory = tmp_path_factory.mktemp("models") / MODEL.name
    try:
        get_model(MODEL.name, directory)
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is neither in {MODEL} nor to be had: {error}")
    return directory


@pytest.mark.slow
def test_smollm2_knows_enough_of_every_kind(smollm2, tmp_path):
    """Wrong if attack success were measured on too few countries, or over-refusal on one kind alone."""
    FactsWorld("facts").write(tmp_path, str(smollm2))
    summary = json.loads((tmp_path / "world.json").read_text())
    known, asked = summary["known"], summary["asked"]
    # 81, 57, 28, 51, 52, 11, 39 and 32 in 4 bits; the published weights know a little more.
    least = {"capitals": 65, "continents": 40, "currencies": 20, "languages": 40, "antonyms": 40}
    assert {kind: known[kind] for kind, number in least.items() if known[kind] < number} == {}
    assert all(0 < known[kind] <= asked[kind] for kind in asked)
    assert 40 <= summary["rows"]["harmful_prompts"] <= 100
    assert summary["rows"]["safe"] >= 400
    assert len([kind for kind in asked if summary["rows"].get(f"benign_prompts_{kind}")]) >= 4
    for name in FILES:
        rows = Source(path=str(tmp_path / "data" / f"{name}.jsonl")).load()
        assert all(row.reference for row in rows)
