"""What cannot be run ends in one readable message: key, value and remedy, and no stack trace."""

from copy import deepcopy

import pytest

from tests.commands import (
    cli,
    patcher_settings,
    redteam_settings,
    sft_settings,
    write_rows,
    write_yaml,
)

DELETE = object()


def changed(settings, key, value):
    """Settings with one entry set, or deleted; numbers in the dotted key index lists."""
    settings = deepcopy(settings)
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place = settings
    for part in parents:
        place = place[part]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return settings


def complain(command, config, run_dir, *arguments):
    """Runs a command that must fail, and returns its one message."""
    said = cli(command, "--config", config, "--run_dir", run_dir, *arguments)
    assert said.status == 2, said
    # Whatever is wrong with data is found behind the line that says how large the model is.
    assert all(" weights, " in line for line in said.out.splitlines()), said.out
    prefix = f"patcher_pl {command}: error: "
    assert said.err.count(prefix) == 1, said.err
    message = said.err[said.err.index(prefix) :]
    assert "Traceback" not in said.err
    assert 'File "' not in said.err
    assert message.count("\n") <= 8, message
    assert "Namespace(" not in message
    return message


ATTACKER = "model.init_args.attacker"
CASES = {
    "unknown-key": ("trainer.max_stepz", 3, ["max_stepz"]),
    "unknown-key-of-a-defense": ("model.init_args.alhpa", 0.5, ["alhpa", "Patcher"]),
    "unknown-key-of-a-source": ("data.safe.sources.0.pth", "x", ["pth"]),
    "unknown-section": ("trianer", {"max_steps": 3}, ["trianer"]),
    "wrong-type": ("data.batch_size", "many", ["batch_size", "many", "int"]),
    "wrong-type-deep-down": (f"{ATTACKER}.init_args.num_steps", "few", ["num_steps", "few", "int"]),
    "wrong-defense": ("model.class_path", "patcher_pl.defenses.Pacher", ["model", "Pacher"]),
    "no-defense": ("model.class_path", "torch.nn.Linear", ["model", "Linear", "Defense"]),
    "wrong-attacker": (f"{ATTACKER}.class_path", "patcher_pl.Atacker", ["attacker", "Atacker"]),
    "wrong-judge": ("redteam.judge.class_path", "patcher_pl.Juge", ["judge", "Juge"]),
    "missing-attacker": (ATTACKER, DELETE, ["attacker"]),
    "missing-model": ("model", DELETE, ["model"]),
    "missing-data": ("data.safe", DELETE, ["safe"]),
    "value-of-a-defense": ("model.init_args.alpha", 1.5, ["alpha", "1.5", "[0, 1]"]),
    "value-of-an-attacker": (
        f"{ATTACKER}.init_args.num_steps",
        0,
        ["FineTuningAttacker.num_steps", ">= 1", "got 0", "SFT"],
    ),
    "value-of-the-red-team": (
        "redteam.threshold",
        2.0,
        ["RedTeam.threshold", "(0, 1]", "2.0"],
    ),
    "control-of-another-defense": (
        "control",
        {"model.init_args.alpha": 1.0},
        ["control", "options of SFT", "model.init_args.alpha", "Patcher", "max_grad_norm"],
    ),
    "control-with-other-steps": (
        "control",
        {"trainer.max_steps": 3},
        ["control", "trainer.max_steps", "those of the run", "model.init_args.optimizer"],
    ),
    "unknown-key-of-a-control": (
        "control",
        {"model.init_args.optimizer.init_args.lrr": 0.1},
        ["control", "optimizer", "lrr"],
    ),
    "value-of-a-control": (
        "control",
        {"model.init_args.optimizer.init_args.lr": -1},
        ["control", "learning rate", "-1"],
    ),
    "lightning-clipping": (
        "trainer.gradient_clip_val",
        1.0,
        ["trainer.gradient_clip_val", "1.0", "model.init_args.max_grad_norm"],
    ),
    "lightning-accumulation": (
        "trainer.accumulate_grad_batches",
        4,
        ["trainer.accumulate_grad_batches", "4", "model.init_args.accumulate_grad_batches"],
    ),
    "probe-without-red-team": ("redteam", None, ["probe_every_n_steps", "redteam"]),
    "checkpoint-interval": ("checkpoint_every_n_steps", 0, ["every_n_steps", ">= 1", "0"]),
    "probe-interval": ("probe_every_n_steps", 0, ["every_n_steps", ">= 1", "0"]),
    "missing-model-directory": (
        "model.init_args.language_model.path",
        "/nowhere/model",
        ["LanguageModel.path", "/nowhere/model", "config.json"],
    ),
    "missing-file": (
        "data.safe.sources.0.path",
        "/nowhere/safe.jsonl",
        ["/nowhere/safe.jsonl"],
    ),
    "half-precision": ("trainer.precision", "16-true", ["trainer.precision", "16-true", "bf16"]),
    "lightning-value": ("trainer.accelerator", "tpv", ["accelerator", "tpv"]),
}


@pytest.mark.parametrize(("key", "value", "told"), CASES.values(), ids=CASES)
def test_a_bad_entry_is_named_with_its_value_and_remedy(inputs, tmp_path, key, value, told):
    settings = patcher_settings(inputs) | {
        "redteam": redteam_settings(inputs),
        "probe_every_n_steps": 4,
    }
    config = write_yaml(tmp_path / "config.yaml", changed(settings, key, value))
    message = complain("fit", config, tmp_path / "run")
    for part in told:
        assert part in message, message


def test_patcher_without_attack_data_is_told_so(inputs, tmp_path):
    settings = changed(patcher_settings(inputs), "data.attack", DELETE)
    message = complain("fit", write_yaml(tmp_path / "config.yaml", settings), tmp_path / "run")
    assert "attack" in message


@pytest.mark.parametrize(
    ("row", "told"),
    [
        pytest.param('{"prompt": "Tea?", "response": ', ["safe.jsonl", "3"], id="no-json"),
        pytest.param('{"prompt": "Tea?"}', ["safe.jsonl:3", "response"], id="missing-field"),
        pytest.param(
            '{"prompt": "Tea?", "response": 7}', ["safe.jsonl:3", "response"], id="wrong-type"
        ),
    ],
)
def test_a_broken_row_is_named_and_once_mended_the_run_starts(inputs, tmp_path, row, told):
    """Wrong if the failed start counted as an earlier run and had to be cleared away."""
    rows = [{"prompt": "Tea?", "response": "Stir."}, {"prompt": "Milk?", "response": "Wait."}]
    path = write_rows(tmp_path / "safe.jsonl", rows)
    whole = path.read_text()
    path.write_text(whole + row + "\n")
    settings = changed(sft_settings(inputs), "data.safe.sources.0.path", str(path))
    config = write_yaml(tmp_path / "config.yaml", changed(settings, "trainer.max_steps", 1))
    message = complain("fit", config, tmp_path / "run")
    for part in told:
        assert part in message, message
    path.write_text(whole)
    cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)


ONE = "patcher_pl.attackers.FineTuningAttacker"
ADAMW = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
STEPS = {"num_steps": 2, "optimizer": ADAMW}
TWO_PROCESSES = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            "model.init_args.hypergradient",
            {"class_path": "patcher_pl.hypergradients.Adjoint"},
            ["Adjoint with `hvp: patcher_pl.hypergradients.hvp.FiniteDifference`"],
        ),
        (
            ATTACKER,
            {
                "class_path": "patcher_pl.attackers.ConcurrentAttacker",
                "init_args": {
                    "population": [{"attacker": {"class_path": ONE, "init_args": STEPS}}]
                },
            },
            ["Patcher.attacker", "ConcurrentAttacker", "Use a FineTuningAttacker"],
        ),
        ("trainer.strategy", "ddp", ["trainer.strategy", "ModelParallelStrategy"]),
    ],
)
def test_what_several_processes_cannot_do_is_told_before_they_are_started(
    inputs, tmp_path, key, value, told
):
    settings = patcher_settings(inputs) | {"redteam": redteam_settings(inputs)}
    settings["trainer"] |= {"devices": 2, "strategy": TWO_PROCESSES}
    config = write_yaml(tmp_path / "config.yaml", changed(settings, key, value))
    message = complain("fit", config, tmp_path / "run")
    assert all(part in message for part in told), message
    assert not (tmp_path / "run").exists()


def test_probes_are_refused_where_fsdp1_shards(inputs, tmp_path):
    settings = patcher_settings(inputs) | {"redteam": redteam_settings(inputs)}
    settings["model"]["init_args"]["language_model"]["dtype"] = "float64"
    strategy = {"class_path": "tests.distributed.fsdp1_worker.CPUStrategy"}
    settings["trainer"] |= {"devices": 2, "strategy": strategy}
    config = write_yaml(tmp_path / "config.yaml", settings | {"probe_every_n_steps": 2})
    message = complain("fit", config, tmp_path / "run")
    assert "probe_every_n_steps" in message and "ModelParallelStrategy" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_run_dir_is_asked_for(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    said = cli("fit", "--config", config).expect(2)
    assert "run_dir" in said.err
    assert "Traceback" not in said.err


def test_a_missing_config_file_is_named(tmp_path):
    assert "nowhere.yaml" in complain("fit", tmp_path / "nowhere.yaml", tmp_path / "run")


def test_a_config_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: [unclosed\ntrainer: {")
    assert "config" in complain("fit", path, tmp_path / "run")


def test_a_bad_entry_of_another_command_is_named(inputs, tmp_path):
    settings = {"model": str(inputs / "model"), "redteam": redteam_settings(inputs)}
    settings = changed(settings, "redteam.attacks.0.init_args.attack_steps", [5])
    config = write_yaml(tmp_path / "config.yaml", settings)
    message = complain("redteam", config, tmp_path / "run")
    assert "attack_steps" in message
    assert "[5]" in message


def test_an_unknown_command_is_told_what_there_is():
    said = cli("fitt").expect(2)
    assert "fitt" in said.err
    assert "redteam" in said.err


def test_a_checkpoint_that_is_none_is_named(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    message = complain("fit", config, tmp_path / "run", "--ckpt_path", tmp_path / "none.ckpt")
    assert str(tmp_path / "none.ckpt") in message
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(b"PK\x03\x04 half a checkpoint")
    message = complain("fit", config, tmp_path / "run", "--ckpt_path", torn)
    assert str(torn) in message


def test_prompts_that_attackers_train_on_are_found_before_training(inputs, tmp_path):
    """Wrong if that ended a run after hours of training."""
    redteam = redteam_settings(inputs) | {"overlap": "error"}
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs) | {"redteam": redteam})
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    assert "3 of 3 harmful prompts are among the rows that attackers train on" in said.err
    assert not (tmp_path / "run" / "checkpoints").exists()
