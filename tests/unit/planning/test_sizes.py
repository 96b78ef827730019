"""What `fit` says about memory before it begins is what a whole plan says, and it never stops a run."""

import json

import pytest

from patcher_pl.cli import sizes
from patcher_pl.cli.plan import PlanCLI
from patcher_pl.errors import ConfigError
from patcher_pl.planning import make_plan, size_up
from patcher_pl.planning.rehearsal import Footprint, LayerSizes, Work
from patcher_pl.planning.tracker import DEFEND, Part
from tests.commands import QUIET, cli, patcher_settings, redteam_settings, write_inputs, write_yaml

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("sizes"))


def configured(inputs, folder, **changes):
    settings = patcher_settings(inputs) | changes
    return write_yaml(folder / "fit.yaml", settings)


def deepened(inputs, folder, num_layers):
    """The configuration of a model with so many layers, which needs no weights to be planned."""
    config = json.loads((inputs / "model" / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:1] * num_layers
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.mark.slow
def test_two_layers_tell_what_a_whole_rehearsal_tells(inputs, tmp_path):
    """Wrong if the line at the start of `fit` and `plan` contradicted each other."""
    config = configured(inputs, tmp_path)
    deep = ("--model_config", str(deepened(inputs, tmp_path, 6)), "--device_counts=[1]")
    command = PlanCLI(["--config", str(config), "--run_dir", "never", *deep])
    plan = make_plan(command.planned_run, command.settings)
    found = size_up(command.planned_run, command.settings)
    assert found.num_parameters == plan.num_parameters
    assert found.peak is not None
    assert found.peak.peak_phase == plan.configured.peak_phase
    assert found.peak.device_bytes == pytest.approx(plan.configured.device_bytes, rel=1e-3)
    # Two moments in float32 for every weight, on either side.
    for side in ("defender", "attacker"):
        expected = 2 * 4 * found.num_parameters
        assert found.optimizer_bytes[side] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_fit_says_it_and_results_keep_it(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_PARAMETERS", 0)
    config = configured(inputs, tmp_path, redteam=redteam_settings(inputs))
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    assert " weights, " in said.out
    assert "state of optimizers: defender" in said.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    memory = results["environment"]["memory"]
    assert memory["weights_gib"] * GIB == 4 * memory["num_parameters"]
    assert memory["estimated_peak_gib"] > memory["defender_optimizer_gib"] > memory["weights_gib"]


def test_small_models_are_not_rehearsed(inputs, tmp_path):
    """Wrong if every run on the testbed began seconds later."""
    config = configured(inputs, tmp_path)
    command = PlanCLI(["--config", str(config), "--run_dir", "never"])
    found = size_up(command.planned_run, command.settings, sizes.MIN_PARAMETERS)
    assert (found.peak, dict(found.optimizer_bytes)) == (None, {})
    assert found.weight_bytes == 4 * found.num_parameters
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    assert f"{found.num_parameters:,} weights, " in said.out


def test_an_estimate_that_fails_stops_nothing(inputs, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(sizes, "size_up", fails)
    config = configured(inputs, tmp_path, trainer={"max_steps": 1, "accelerator": "cpu", **QUIET})
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    assert "Memory was not estimated: no kernel for this" in said.out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_training_is_the_same_with_an_estimate(inputs, tmp_path, monkeypatch):
    """Wrong if a rehearsal drew from the generators of the run, or left something behind."""
    written = []
    for place, least in (("without", sizes.MIN_PARAMETERS), ("with", 0)):
        monkeypatch.setattr(sizes, "MIN_PARAMETERS", least)
        config = configured(inputs, tmp_path)
        cli("fit", "--config", config, "--run_dir", tmp_path / place).expect(0)
        written.append((tmp_path / place / "model" / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_moments_of_shallow_models_alone_are_no_peaks_of_deep_ones():
    """Wrong if what a step needs for an embedding were drawn out like a layer, or ended the estimate."""
    step = {Part.PARAMETERS: 10, Part.WEIGHT_TEMPORARIES: 90}
    shallow = footprint([{Part.PARAMETERS: 10, Part.ACTIVATIONS: 5}, step])
    deeper = footprint([{Part.PARAMETERS: 12, Part.ACTIVATIONS: 8}])
    expected = {DEFEND: [{Part.PARAMETERS: 10 + 4 * 2, Part.ACTIVATIONS: 5 + 4 * 3}]}
    assert shallow.peaks_with_layers(deeper, 4) == expected
    with pytest.raises(ConfigError, match="do not tell"):
        footprint([step]).peaks_with_layers(deeper, 4)


def footprint(moments):
    layers = LayerSizes(total=0, largest_layer=0, rest=0, num_parameters=0)
    return Footprint(peaks={DEFEND: moments}, layers=layers, plain=Work(), defended=Work())
