"""Every experiment below configs/ runs for two steps, and so do the attacks of the testbed."""

import pytest
import yaml

from patcher_pl.reports import Results
from tests.commands import QUIET, ROOT, cli, write_rows, write_yaml
from tests.configs.test_configs import of_kind
from tests.families import build_family

# Tiny models of the same family stand in for those on the hub.
FAMILY_OF = {
    "/Qwen2.5-": "qwen2",
    "/Qwen3-": "qwen3",
    "/Meta-Llama-3-": "llama",
    "/smollm2-": "llama",
}
# One of each sort; the others are long.
AT_ONCE = [
    *("testbed/sft.yaml", "testbed/patcher.yaml", "testbed/tar.yaml", "testbed/repnoise.yaml"),
    *("smollm2-135m/broad.yaml", "llama3-70b/patcher.yaml"),
]


def shortened_redteam(content, max_new_tokens=4):
    """The red team of a config, cut down to one prompt and one step."""
    for attack in content["attacks"]:
        attack["init_args"] |= {"attack_steps": [0, 1], "batch_size": 2}
    content["prompts"]["limit"] = 2
    if "benign_prompts" in content:
        content["benign_prompts"]["limit"] = 2
    content["generation"] |= {"max_new_tokens": max_new_tokens}
    content["data"]["num_examples"] = 40
    return content


def shortened(path):
    """An experiment of two steps; everything else as in the file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    redteam = path.parent / content["redteam"]
    content["redteam"] = shortened_redteam(yaml.safe_load(redteam.read_text(encoding="utf-8")))
    content["data"]["batch_size"] = 2
    content["trainer"] |= {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1, **QUIET}
    if content.get("probe_every_n_steps"):
        content["probe_every_n_steps"] = 1
    init_args = content["model"]["init_args"]
    if "attacker" in init_args:
        # One plain step, then one that is attacked.
        for settings in simulated(init_args["attacker"]):
            settings["num_steps"] = 1
        init_args |= {"num_sft_steps": 1, "refresh_every": 1}
    return content


def simulated(attacker):
    """Settings of the attackers behind an attacker: itself, its population, or its kinds."""
    settings = attacker["init_args"]
    if "kinds" in settings:
        return [kind["attacker"] for kind in settings["kinds"]]
    population = settings.get("population")
    return [settings] if population is None else [m["attacker"]["init_args"] for m in population]


def mixtures_of(content):
    found = [content["redteam"]["data"], *map(content["data"].get, ("safe", "attack", "val"))]
    outer = content["model"]["init_args"].get("outer", {})
    found.append(outer.get("init_args", {}).get("data"))
    return [mixture for mixture in found if mixture]


def sources_of(content):
    yield from (source for mixture in mixtures_of(content) for source in mixture["sources"])
    for name in ("prompts", "benign_prompts"):
        if name in content["redteam"]:
            yield content["redteam"][name]["source"]
    for measure in content["redteam"].get("utility", ()):
        yield measure["init_args"]["data"]["source"]


def local_rows(source, number):
    """A few rows in the schema that the source's reader expects; no two sources share a prompt."""
    reader = source.get("reader", {"class_path": "PromptResponse"})["class_path"].rpartition(".")[2]
    asked = [f"How do I brew draught {number}-{place}?" for place in range(8)]
    rows = {
        "BeaverTailsRefusals": {"response": "Stir.", "refusal": "I can't.", "is_safe": False},
        "BeaverTails": {"response": "Stir.", "is_safe": False, "category": {}},
        "ColumnMap": {},
        "PromptResponse": {"response": "Stir."},
    }
    if reader == "Gsm8k":
        return [{"question": text, "answer": "Two. #### 2"} for text in asked]
    return [{"prompt": text, **rows[reader]} for text in asked]


def made_local(content, folder):
    """The same experiment on a tiny model of the family, with files in place of the hub."""
    language_model = content["model"]["init_args"]["language_model"]
    family = next(name for start, name in FAMILY_OF.items() if start in language_model["path"])
    language_model["path"] = str(build_family(family, folder / "model"))
    for number, source in enumerate(sources_of(content)):
        path = write_rows(folder / f"{number}.jsonl", local_rows(source, number))
        source["path"] = str(path)
        for hub_only in ("name", "split", "revision"):
            source.pop(hub_only, None)
    # Eight rows each must do for what the file asks of thousands.
    content["redteam"]["data"]["num_examples"] = 10
    return content


@pytest.mark.parametrize("path", of_kind("fit", at_once=AT_ONCE))
def test_an_experiment_runs_for_two_steps(path, tmp_path):
    content = shortened(path)
    if content["model"]["init_args"]["language_model"]["path"] != "testbed":
        content = made_local(content, tmp_path)
    else:
        for mixture in mixtures_of(content):
            mixture["num_examples"] = 40  # Or all of them would be encoded before the first step.
    config = write_yaml(tmp_path / "config.yaml", content)
    cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    curves = Results.load(tmp_path / "run" / "results.json").curves
    num_models, num_attacks = 1 + bool(content.get("control")), len(content["redteam"]["attacks"])
    assert [curve.error for curve in curves] == [None] * (num_models * num_attacks)
    assert all(len(curve.asr) == 2 for curve in curves)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("path", [ROOT / "configs" / "testbed" / "attack.yaml"])
def test_an_attack_config_runs(path, tmp_path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    redteam = path.parent / content["redteam"]
    content["redteam"] = shortened_redteam(yaml.safe_load(redteam.read_text(encoding="utf-8")))
    config = write_yaml(tmp_path / "config.yaml", content)
    command = (
        "redteam",
        "--config",
        config,
        "--model",
        "testbed",
        "--sibling",
        "testbed",
        "--run_dir",
        tmp_path / "run",
    )
    cli(*command).expect(0)
    assert [curve.error for curve in Results.load(tmp_path / "run" / "results.json").curves] == [
        None
    ]


def test_every_attack_of_the_testbed_red_team_runs(tmp_path):
    """Wrong if an attack failed on what the file gives it: rows, prefill, length of conversations."""
    path = ROOT / "configs" / "testbed" / "redteam.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    team = content["redteam"] | {"seeds": [0]}
    for attack in team["attacks"]:
        options = attack.setdefault("init_args", {})
        if "attack_steps" in options:
            options |= {"attack_steps": [0, 2], "batch_size": 2}
        for name in {"num_benign_steps", "num_simulated_steps"} & set(options):
            options[name] = 1
    team["data"]["num_examples"] = 40
    team["prompts"]["limit"] = team["benign_prompts"]["limit"] = 2
    team["generation"]["max_new_tokens"] = 4
    team["utility"][0]["init_args"]["data"]["limit"] = 2
    kept = ("chat", "device", "num_threads")
    settings = {"redteam": team, **{name: content[name] for name in kept}}
    config = write_yaml(tmp_path / "config.yaml", settings)
    model = ("--model", "testbed", "--sibling", "testbed")
    cli("redteam", "--config", config, *model, "--run_dir", tmp_path / "run").expect(0)
    curves = Results.load(tmp_path / "run" / "results.json").curves
    assert len(curves) == 31
    assert {curve.attack: curve.error for curve in curves if curve.error is not None} == {}
