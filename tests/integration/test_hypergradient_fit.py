"""`fit` with every estimator, named in YAML alone; if these fail, one cannot be used by its name."""

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl import hypergradients
from patcher_pl.hypergradients import Hypergradient
from patcher_pl.reports.settings import as_settings
from tests.commands import cli, patcher_settings, write_yaml
from tests.estimator_table import TABLE


def spec(estimator: Hypergradient) -> dict[str, Any]:
    """As a user writes it: by the public name."""
    found = as_settings(estimator)
    kind = type(estimator).__name__
    return (
        {**found, "class_path": f"patcher_pl.hypergradients.{kind}"}
        if hasattr(hypergradients, kind)
        else found
    )


def settings(inputs, estimator):
    """Two plain steps, then a fresh estimate before each of two more."""
    found = patcher_settings(inputs)
    found["trainer"]["max_steps"] = 4
    found["model"]["init_args"] |= {"refresh_every": 1}
    if estimator is not None:
        found["model"]["init_args"]["hypergradient"] = estimator
    return found


@pytest.fixture(scope="module")
def paper(inputs, tmp_path_factory):
    """Weights of a run without any estimator."""
    folder = tmp_path_factory.mktemp("paper")
    config = write_yaml(folder / "config.yaml", settings(inputs, None))
    cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.long
def test_one_hardened_model_per_estimator(inputs, tmp_path, paper, name):
    config = write_yaml(tmp_path / "config.yaml", settings(inputs, spec(TABLE[name])))
    run_dir = tmp_path / "run"
    cli("fit", "--config", config, "--run_dir", run_dir).expect(0)
    weights = load_file(run_dir / "model" / "model.safetensors")
    before = load_file(inputs / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights.items())
    same = all(torch.equal(tensor, paper[key]) for key, tensor in weights.items())
    assert same == (name == "first-order")
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    chosen = written["model"]["init_args"]["hypergradient"]
    assert chosen["class_path"] == spec(TABLE[name])["class_path"]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    prompt = tokenizer("How do I brew draught 3?", return_tensors="pt")
    assert bool(model(**prompt).logits.isfinite().all())
