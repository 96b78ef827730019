"""The `redteam` command: what it writes, how it goes on, and what it refuses."""

import json
from dataclasses import dataclass, replace

import pytest
import yaml
from jsonargparse import ArgumentParser

from patcher_pl.errors import ConfigError, DataError, PatcherError
from patcher_pl.optim import AdamW
from patcher_pl.redteam import Attack, FullFinetuning, RedTeam
from patcher_pl.redteam.command import run_redteam
from patcher_pl.reports import Results


@dataclass(frozen=True, kw_only=True)
class Interrupted(Attack):
    """Stands for a run that is stopped: raises while `path` exists."""

    path: str
    failure: str = "KeyboardInterrupt"

    @property
    def default_name(self):
        return "second"

    def run(self, model, material):
        from pathlib import Path

        if Path(self.path).exists():
            raise {"KeyboardInterrupt": KeyboardInterrupt, "RuntimeError": RuntimeError}[
                self.failure
            ]("stopped here")
        attack = FullFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0, 1])
        yield from attack.run(model, material)


@pytest.fixture
def quick(red_team):
    attack = FullFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 1], label="first")
    generation = replace(red_team.generation, max_new_tokens=4)
    return replace(red_team, attacks=[attack], generation=generation, seeds=[0, 1])


def test_it_writes_results_tables_and_figures(model_dir, quick, tmp_path, capsys):
    results = run_redteam(str(model_dir), quick, tmp_path, defense="patcher", k1=40, device="cpu")
    written = json.loads((tmp_path / "results.json").read_text())
    for seed, curve in enumerate(written["curves"]):
        assert curve["defense"] == "patcher"
        assert curve["k1"] == 40
        assert curve["seed"] == seed
        assert curve["attack"] == "first"
        assert curve["attack_steps"] == [0, 1]
        assert curve["asr"] == [0.0, 0.0]
        assert curve["benign_accuracy"] == [None, None]
        assert curve["steps_to_break"] is None
    assert written["environment"]["packages"]["torch"]
    assert Results.load(tmp_path / "results.json") == results
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * 2
    assert (tmp_path / "asr.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "asr.svg").read_bytes()
    shown = capsys.readouterr().out
    assert "Patcher, k1 = 40" in shown
    assert "> 1" in shown


def test_it_goes_on_where_it_was_interrupted(model_dir, quick, tmp_path):
    """Wrong if a night of attacks were lost with the last one."""
    stop = tmp_path / "stop"
    stop.touch()
    team = replace(quick, attacks=[*quick.attacks, Interrupted(path=str(stop))], seeds=[0])
    with pytest.raises(KeyboardInterrupt):
        run_redteam(str(model_dir), team, tmp_path / "run", device="cpu")
    kept = Results.load(tmp_path / "run" / "results.json").curves
    assert [curve.attack for curve in kept] == ["first"]
    marked = replace(kept[0], samples=[])  # To tell a kept curve from a repeated one.
    earlier = Results.load(tmp_path / "run" / "results.json")
    replace(earlier, curves=[marked]).save(tmp_path / "run" / "results.json")
    stop.unlink()
    results = run_redteam(str(model_dir), team, tmp_path / "run", device="cpu")
    assert [curve.attack for curve in results.curves] == ["first", "second"]
    assert results.curves[0] == marked


def test_results_of_other_settings_or_weights_are_not_mixed(model_dir, quick, tmp_path):
    """Wrong if a figure showed curves of two experiments as one."""
    run_redteam(str(model_dir), quick, tmp_path, device="cpu")
    other = replace(quick, threshold=0.6)
    with pytest.raises(ConfigError, match="results of other settings"):
        run_redteam(str(model_dir), other, tmp_path, device="cpu")
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # Trained again, for all the command can know.
    with pytest.raises(ConfigError, match="another model"):
        run_redteam(str(model_dir), quick, tmp_path, device="cpu")


def test_a_broken_results_file_is_not_overwritten(model_dir, quick, tmp_path):
    (tmp_path / "results.json").write_text('{"curves": [')
    with pytest.raises(DataError, match=r"results\.json: this is no usable results file"):
        run_redteam(str(model_dir), quick, tmp_path, device="cpu")
    assert (tmp_path / "results.json").read_text() == '{"curves": ['


def test_if_every_attack_fails_the_command_fails(model_dir, quick, tmp_path):
    """Wrong if a script took an empty figure for success."""
    stop = tmp_path / "stop"
    stop.touch()
    team = replace(quick, attacks=[Interrupted(path=str(stop), failure="RuntimeError")])
    with pytest.raises(PatcherError, match=r"Every attack failed.*stopped here"):
        run_redteam(str(model_dir), team, tmp_path / "run", device="cpu")
    assert Results.load(tmp_path / "run" / "results.json").curves[0].error


def test_unknown_model_and_device_are_named(quick, model_dir, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        run_redteam(str(tmp_path / "nowhere"), quick, tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="'abacus' cannot be used"):
        run_redteam(str(model_dir), quick, tmp_path / "run", device="abacus")


def test_the_signature_is_a_config_schema(tmp_path, recipes):
    """Wrong if YAML could not name the parts of a red team."""
    source = {"path": recipes, "harmful": True}
    lora = {"class_path": "patcher_pl.redteam.LoraFinetuning"}
    lora["init_args"] = {
        "optimizer": {"class_path": "patcher_pl.optim.SGD", "init_args": {"lr": 0.1}},
        "attack_steps": [0, 10],
        "lora": {"rank": 4},
    }
    config = {
        "model": "some/model",
        "run_dir": str(tmp_path),
        "redteam": {
            "attacks": [lora],
            "data": {"sources": [source], "num_examples": 2},
            "prompts": {"source": source, "limit": 2},
            "judge": {"class_path": "patcher_pl.evaluation.RefusalPhraseJudge"},
            "generation": {"max_new_tokens": 8},
            "seeds": [0, 1],
        },
        "chat": {"system_prompt": "You are a careful potion master."},
    }
    path = tmp_path / "redteam.yaml"
    path.write_text(yaml.safe_dump(config))
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(run_redteam)
    built = parser.instantiate(parser.parse_args([f"--config={path}", "--k1=40"]))
    assert isinstance(built.redteam, RedTeam)
    assert built.redteam.attacks[0].name == "lora_sgd"
    assert built.redteam.attacks[0].lora.rank == 4
    assert built.redteam.prompts.limit == 2
    assert built.chat.system_prompt == "You are a careful potion master."
    assert built.k1 == 40
