"""`fit` on a plain Hugging Face directory and two JSONL files: what a run leaves behind."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import (
    Witness,
    cli,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_yaml,
)

# 2 plain steps, 6 steps of two passes, 2 attacks of 2 steps.
GRADIENT_EVALUATIONS = 2 + 6 * 2 + 2 * 2


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A Patcher run with red team, probe and control."""
    folder = tmp_path_factory.mktemp("fit")
    settings = patcher_settings(inputs) | {
        "control": True,
        "probe_every_n_steps": 4,
        "redteam": redteam_settings(inputs),
    }
    settings["trainer"]["callbacks"] = [{"class_path": "tests.commands.Witness"}]
    settings["data"]["val"] = settings["data"]["safe"]
    config = write_yaml(folder / "config.yaml", settings)
    Witness.modules.clear()
    said = cli("fit", "--config", config, "--run_dir", folder / "run").expect(0)
    modules = list(Witness.modules)
    Witness.modules.clear()
    return SimpleNamespace(config=config, dir=folder / "run", said=said, modules=modules)


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def load_cost(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["defense"]["cost"]


def events(run_dir, name):
    # Text and hparams come as tensors; 0 keeps all of every kind.
    loaded = EventAccumulator(str(run_dir / "tensorboard" / name), {"scalars": 0, "tensors": 0})
    return loaded.Reload()


def test_a_run_leaves_everything_in_its_directory(run):
    found = {
        str(path.relative_to(run.dir)) for path in run.dir.rglob("*") if "tfevents" not in path.name
    }
    assert {
        "config.yaml",
        "results.json",
        "results.csv",
        "asr.png",
        "asr.svg",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000008.ckpt",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/chat_template.jinja",
        "control/model/model.safetensors",
        "control/checkpoints/last.ckpt",
    } <= found
    assert not [name for name in found if ".tmp" in name or ".old" in name]
    assert "Patcher, k1 = 2" in run.said.out
    assert "SFT" in run.said.out
    assert str(run.dir) in run.said.out.replace("\n", "")


def test_training_moves_the_weights(run, inputs):
    before = load_file(inputs / "model" / "model.safetensors")
    after = weights(run.dir)
    assert before.keys() == after.keys()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_export_answers_as_the_model_in_memory(run):
    """Wrong if the attacked weights, or those of the red team, were exported."""
    for module, directory in zip(run.modules, [run.dir, run.dir / "control"], strict=True):
        exported = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(directory / "model")
        assert tokenizer.chat_template == module.tokenizer.chat_template
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "How do I brew draught 3?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        live = module.model.eval()
        assert torch.equal(exported(**prompt).logits, live(**prompt).logits)
        greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        assert torch.equal(exported.generate(**prompt, **greedy), live.generate(**prompt, **greedy))


def test_the_control_costs_as_many_gradient_evaluations(run):
    """Wrong if the comparison of the defense with SFT were unfair."""
    assert load_cost(run.dir)["gradient_evaluations"] == GRADIENT_EVALUATIONS
    assert load_cost(run.dir / "control")["gradient_evaluations"] == GRADIENT_EVALUATIONS
    assert [type(module).__name__ for module in run.modules] == ["Patcher", "SFT"]


def test_results_json_has_the_agreed_schema(run, inputs):
    content = json.loads((run.dir / "results.json").read_text())
    patcher, control = content["curves"]
    for curve in (patcher, control):
        assert curve["attack"] == "full_adamw"
        assert curve["seed"] == 0
        assert curve["attack_steps"] == [0, 2]
        for rates in (curve["asr"], curve["benign_accuracy"]):
            assert len(rates) == 2
            assert all(0 <= rate <= 1 for rate in rates)
        assert curve["steps_to_break"] in (None, 0, 2)
        assert curve["train_seed"] == 3
    assert (patcher["defense"], patcher["k1"]) == ("patcher", 2)
    assert (control["defense"], control["k1"]) == ("sft", None)
    assert {"packages", "platform"} <= content["environment"].keys()
    assert content["training_data"].keys() == {"safe", "attack"}
    assert all(drawn["num_rows"] > 0 for drawn in content["training_data"].values())
    assert all(0 < curve["trained_poison_ratio"] <= 1 for curve in (patcher, control))


def test_tensorboard_has_the_agreed_tags(run):
    main = events(run.dir, "patcher")
    scalars = set(main.Tags()["scalars"])
    assert {
        "train/loss_safe",
        "train/loss_attacked",
        "train/attack_gap",
        "train/grad_norm",
        "attack/loss",
        "attack/vector_norm",
        "robustness/asr_at_0",
        "robustness/asr_at_2",
        "robustness/steps_to_break",
        "robustness/benign_accuracy",
        "cost/gradient_evaluations",
        "cost/tokens_per_second",
        "cost/peak_memory_gib",
        "val/loss",
    } <= scalars
    assert [point.step for point in main.Scalars("train/attack_gap")] == [3, 4, 5, 6, 7, 8]
    # Probed at 4, and measured once at the end, which is no reason to probe as well.
    assert [point.step for point in main.Scalars("robustness/asr_at_0")] == [4, 8]
    assert main.Scalars("cost/gradient_evaluations")[-1].value == GRADIENT_EVALUATIONS
    assert "robustness/asr_curve" in main.Tags()["images"]
    tensors = main.Tags()["tensors"]
    assert any(tag.startswith("robustness/answers") for tag in tensors)
    hyperparameters = main.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert hyperparameters.plugin_name == "hparams"
    assert b"attacker.num_steps" in hyperparameters.content
    assert "final/asr_at_2" in scalars
    control = set(events(run.dir, "sft-control").Tags()["scalars"])
    assert {"train/loss_safe", "cost/gradient_evaluations", "robustness/asr_at_2"} <= control
    assert "train/attack_gap" not in control


def test_a_second_run_in_the_same_directory_is_refused(run):
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    said = cli("fit", "--config", run.config, "--run_dir", run.dir).expect(2)
    assert said.err.count("\n") == 1
    assert "holds an earlier run" in said.err
    assert "--overwrite true" in said.err
    assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")} == before


def test_its_config_repeats_the_run(run, tmp_path):
    """Wrong if config.yaml left out anything that decides the outcome."""
    again = tmp_path / "again"
    repeated = ("fit", "--config", run.dir / "config.yaml", "--run_dir", again)
    cli(*repeated, "--redteam", "null", "--probe_every_n_steps", "null").expect(0)
    assert_same_weights(weights(again), weights(run.dir))
    assert_same_weights(weights(again / "control"), weights(run.dir / "control"))
    assert json.loads((again / "results.json").read_text())["curves"] == []


def test_going_on_with_a_finished_run_changes_nothing(run):
    """Wrong if the control were trained, or anything attacked, a second time."""
    before = weights(run.dir), weights(run.dir / "control"), (run.dir / "results.json").read_text()
    cli("fit", "--config", run.config, "--run_dir", run.dir, "--ckpt_path", "last").expect(0)
    assert_same_weights(weights(run.dir), before[0])
    assert_same_weights(weights(run.dir / "control"), before[1])
    curves = [
        json.loads(text)["curves"] for text in (before[2], (run.dir / "results.json").read_text())
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_config_of_a_run_also_measures_its_losses(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ("--config", run.dir / "config.yaml")
    exported = ("--model.language_model.path", run.dir / "model")
    losses = []
    for source in (("--ckpt_path", "last"), exported, ()):
        said = cli(command, *config, *source).expect(0)
        losses.append(re.search(r"(val|test)/loss\W+([\d.]+)", said.out).groups())
    from_checkpoint, from_export, untrained = losses
    assert from_checkpoint[0] == command.removesuffix("idate")
    assert from_checkpoint == from_export
    assert float(untrained[1]) > float(from_export[1])
    assert not list(tmp_path.iterdir())


def test_ckpt_path_last_without_a_checkpoint_is_an_error(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    run_dir = tmp_path / "run"
    said = cli("fit", "--config", config, "--run_dir", run_dir, "--ckpt_path", "last").expect(2)
    assert said.err.count("\n") == 1
    assert f"no checkpoint in {run_dir / 'checkpoints'}" in said.err
    assert not run_dir.exists()


def test_overwriting_happens_once_and_spares_other_files(inputs, tmp_path):
    """Wrong if config.yaml of an overwriting run would delete a run when it is used again."""
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    run_dir = tmp_path / "run"
    command = ("fit", "--config", config, "--run_dir", run_dir, "--trainer.max_steps", 1)
    cli(*command).expect(0)
    (run_dir / "notes.txt").write_text("mine")
    cli(*command, "--overwrite", "true", "--seed_everything", 4).expect(0)
    assert (run_dir / "notes.txt").read_text() == "mine"
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["seed_everything"] == 4
    assert len(list((run_dir / "tensorboard" / "sft").glob("events*"))) == 1
    said = cli("fit", "--config", run_dir / "config.yaml").expect(2)
    assert "holds an earlier run" in said.err


def test_a_rehearsal_writes_nothing(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", patcher_settings(inputs))
    run_dir = tmp_path / "run"
    rehearsed = ("--trainer.fast_dev_run", "true")
    cli("fit", "--config", config, "--run_dir", run_dir, *rehearsed).expect(0)
    assert not run_dir.exists()
