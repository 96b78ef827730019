"""The `redteam` command: what it writes, how it goes on, and what it refuses."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.data import Mixture, Source
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.evaluation import Benchmark
from patcher_pl.evaluation.judges import LlmJudge
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.redteam import Attack, FullFinetuning, RedTeam, Search
from patcher_pl.redteam.grid import ModelName
from patcher_pl.redteam.job import AttackedModel, AttackJob, Bench
from patcher_pl.redteam.target import Target
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
    results = run_redteam(quick, tmp_path, str(model_dir), defense="patcher", k1=40, device="cpu")
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
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    kept = Results.load(tmp_path / "run" / "results.json").curves
    assert [curve.attack for curve in kept] == ["first"]
    (cell,) = (tmp_path / "run" / "cells").rglob("*.json")
    content = json.loads(cell.read_text())
    content["curve"]["samples"] = []  # To tell a kept curve from a repeated one.
    cell.write_text(json.dumps(content))
    stop.unlink()
    results = run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    assert [curve.attack for curve in results.curves] == ["first", "second"]
    assert results.curves[0] == replace(kept[0], samples=[])


def test_attacks_of_other_settings_are_not_mixed(model_dir, quick, tmp_path):
    """Wrong if a figure showed curves of two experiments as one."""
    team = replace(quick, seeds=[0])
    run_redteam(team, tmp_path, str(model_dir), device="cpu")
    (first,) = (tmp_path / "cells").rglob("*.json")
    longer = replace(team, generation=replace(team.generation, max_new_tokens=5))
    assert len(run_redteam(longer, tmp_path, str(model_dir), device="cpu").curves) == 1
    assert len(set((tmp_path / "cells").rglob("*.json"))) == 2
    run_redteam(team, tmp_path, str(model_dir), device="cpu")
    assert len(set((tmp_path / "cells").rglob("*.json"))) == 2
    assert first.exists(), "going back to earlier settings must cost nothing"


def test_more_attacks_and_seeds_cost_only_themselves(model_dir, quick, tmp_path):
    """Wrong if adding a seed to a grid repeated the whole grid."""
    run_redteam(replace(quick, seeds=[0]), tmp_path, str(model_dir), device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    results = run_redteam(quick, tmp_path, str(model_dir), device="cpu")
    assert [curve.seed for curve in results.curves] == [0, 1]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert len(after) == 2
    assert after.items() > before.items()


def test_another_bound_of_usefulness_repeats_no_attack(model_dir, quick, tmp_path):
    """Wrong if what is made of a curve cost the curve, or the old bound stayed."""
    team = replace(quick, seeds=[0])
    run_redteam(team, tmp_path, str(model_dir), device="cpu")
    (cell,) = (tmp_path / "cells").rglob("*.json")
    before = cell.stat().st_mtime_ns
    stricter = replace(team, min_benign_kept=0.99)
    (curve,) = run_redteam(stricter, tmp_path, str(model_dir), device="cpu").curves
    assert curve.min_benign_kept == 0.99
    assert cell.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"RedTeam\.min_benign_kept must be in \[0, 1\], got 90"):
        replace(team, min_benign_kept=90)


def test_fresh_weights_are_a_model_like_others_and_marked(model_dir, quick, tmp_path):
    """Wrong if the reference were a defense, or missed the strongest attack that was found."""
    pytest.importorskip("optuna")
    team = replace(quick, seeds=[0])
    models = [
        Target(defense="sft", path=str(model_dir)),
        Target(defense="from scratch", path=str(model_dir), from_scratch_seed=0),
    ]
    options = {"models": models, "device": "cpu", "search": Search(num_trials=1, lr=[1e-5, 1e-3])}
    results = run_redteam(team, tmp_path, **options)
    marked = {(curve.defense, curve.from_scratch) for curve in results.curves}
    assert marked == {("sft", False), ("from scratch", True)}
    assert [search.defense for search in results.searches] == ["sft"]
    strongest = results.searches[0].strongest(is_bounded=True)
    taught = {curve.attack for curve in results.curves if curve.from_scratch}
    assert {"first", strongest.attack} <= taught


def test_results_of_another_command_are_not_overwritten(model_dir, quick, tmp_path):
    """Wrong if attacking into the directory of a `fit` lost what that had found out."""
    (tmp_path / "results.json").write_text('{"curves": []}')
    with pytest.raises(ConfigError, match="holds results of another command"):
        run_redteam(quick, tmp_path, str(model_dir), device="cpu")
    (tmp_path / "cells").mkdir()  # A `fit` keeps cells too.
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="holds results of another command"):
        run_redteam(quick, tmp_path, str(model_dir), device="cpu")
    assert (tmp_path / "results.json").read_text() == '{"curves": []}'


def test_a_broken_cell_is_named(model_dir, quick, tmp_path):
    run_redteam(replace(quick, seeds=[0]), tmp_path, str(model_dir), device="cpu")
    (cell,) = (tmp_path / "cells").rglob("*.json")
    cell.write_text('{"curve": [')
    with pytest.raises(PatcherError, match=r"first-seed-0-\w+\.json: this is no outcome"):
        run_redteam(quick, tmp_path, str(model_dir), device="cpu")


def test_if_every_attack_fails_the_command_fails(model_dir, quick, tmp_path):
    """Wrong if a script took an empty figure for success."""
    stop = tmp_path / "stop"
    stop.touch()
    team = replace(quick, attacks=[Interrupted(path=str(stop), failure="RuntimeError")])
    with pytest.raises(PatcherError, match=r"Every attack failed.*stopped here"):
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    assert Results.load(tmp_path / "run" / "results.json").curves[0].error


def test_unknown_model_and_device_are_named(quick, model_dir, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        run_redteam(quick, tmp_path / "run", str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ConfigError, match="'abacus' cannot be used"):
        run_redteam(quick, tmp_path / "run", str(model_dir), device="abacus")


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


def other_weights(model, recipes):
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def other_generation(model, recipes):
    (model / "generation_config.json").write_text('{"do_sample": true}')


def other_template(model, recipes):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


def other_tokenizer(model, recipes):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": 0}))


def other_rows(model, recipes):
    recipes.write_text(recipes.read_text().replace("petals", "leaves"))


@pytest.mark.parametrize(
    "change",
    [other_weights, other_generation, other_template, other_tokenizer, other_rows],
)
def test_a_cell_depends_on_the_content_of_all_that_it_names(
    model_dir, recipes, quick, tmp_path, change
):
    """Wrong if an attack were "done already" after its model, data or prompts had changed."""
    model, rows = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "rows.jsonl"
    rows.write_text(Path(recipes).read_text())

    def digest(model, rows):
        source = Source(path=str(rows), harmful=True)
        team = replace(quick, data=Mixture(sources=[source]), prompts=Benchmark(source=source))
        attacked = AttackedModel(
            name=ModelName("sft"), language_model=LanguageModel(path=str(model)), bench=Bench()
        )
        return AttackJob.plan(team, team.cells()[0], attacked, tmp_path).digest

    known = digest(model, rows)
    os.utime(rows)
    os.utime(model / "model.safetensors")
    (model / "README.md").write_text("It was copied.")
    moved = shutil.copytree(model, tmp_path / "moved")
    assert digest(model, rows) == known == digest(moved, rows), "nothing that matters changed"
    change(model, rows)
    assert digest(model, rows) != known


def test_how_patiently_a_judge_is_asked_changes_no_outcome(quick, model_dir, tmp_path):
    """Wrong if a run with a larger timeout repeated what is there, or one with another rubric not."""
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Score it.")

    def digest(**judge):
        team = replace(quick, judge=LlmJudge(model="judge", rubric=rubric, **judge))
        language_model = LanguageModel(path=str(model_dir))
        model = AttackedModel(name=ModelName("sft"), language_model=language_model, bench=Bench())
        return AttackJob.plan(team, team.cells()[0], model, tmp_path).digest

    known = digest()
    assert digest(timeout_s=5.0, concurrency=2, max_attempts=9, cache=tmp_path / "a") == known
    assert digest(temperature=0.7) != known
    rubric.write_text("Score it strictly.")
    assert digest() != known
