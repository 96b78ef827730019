"""Every YAML below configs/ can be parsed and built."""

from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from patcher_pl import defenses
from patcher_pl.ablation import ComparisonGrid
from patcher_pl.ablation.hardening import plan_hardening
from patcher_pl.cli.ablate import run_ablate
from patcher_pl.cli.compare import run_compare
from patcher_pl.cli.lightning_cli import PatcherCLI
from patcher_pl.cli.main import function_parser
from patcher_pl.cli.redteam import run_redteam
from patcher_pl.cli.scale import run_scale
from patcher_pl.comparison import Column
from patcher_pl.comparison.trials import plan_trials
from patcher_pl.defenses.strategies import replicates, shards
from patcher_pl.errors import ConfigError
from patcher_pl.evaluation import Benchmark, Judge
from patcher_pl.jobs import Fit, plan_sweep
from patcher_pl.redteam import RedTeam
from patcher_pl.reports.decision import load_criteria
from patcher_pl.reports.prices import Prices
from tests.commands import ROOT, write_yaml

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT / "configs")) for path in CONFIGS]

# What cannot be sharded, and what is said about it.
ON_ONE_DEVICE = {
    "ConcurrentAttacker": "a ConcurrentAttacker needs",
    "defenses.Tar": "Tar works on one device only",
    "defenses.Seam": "Seam works on one device only",
    "defenses.TVaccine": "TVaccine works on one device only",
    "defenses.RepNoise": "RepNoise works on one device only",
}


@cache
def kind(path: Path) -> str:
    """Which command, or option, a file is for, told by its keys."""
    folders = {"strategies": "strategy", "judges": "judge", "benchmarks": "benchmark"}
    folders |= {"generation": "generation", "attackers": "attacker"}
    if path.parent.name in folders:
        return folders[path.parent.name]
    keys = yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    if {"model", "trainer"} <= keys:
        return "fit"
    if {"base", "variants"} <= keys:
        return "sweep"
    if {"base", "comparison"} <= keys:
        return "ablation"
    if {"defenses", "budgets"} <= keys:
        return "study"
    if {"defenses", "selection"} <= keys:
        return "comparison"
    if {"title", "criteria"} <= keys:
        return "criteria"
    if "tiers" in keys:
        return "prices"
    if {"attacks", "judge"} <= keys:
        return "red team"
    if "redteam" in keys:
        return "redteam"
    if "search" in keys:
        return "search"
    raise AssertionError(f"{path}: of no kind that this test knows; teach it the new kind.")


def of_kind(wanted, at_once=NAMES):
    """Files of a kind; those that are not named in `at_once` are long."""
    return [
        pytest.param(path, id=name, marks=[] if name in at_once else pytest.mark.long)
        for path, name in zip(CONFIGS, NAMES, strict=True)
        if kind(path) == wanted
    ]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Fails as soon as weights, a tokenizer or data are asked for."""

    def refuse(*_, **__):
        raise AssertionError("Building a configuration must load nothing.")

    import datasets
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)


def ignoring_deprecations(function):
    return pytest.mark.filterwarnings(
        "ignore:(?s).*(instantiate_classes|JsonargparseDeprecationWarning):DeprecationWarning"
    )(function)


def red_team(path):
    """The red team of a file, as `--redteam PATH` reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--redteam", type=RedTeam, sub_configs=True)
    return parser.instantiate(parser.parse_args(["--redteam", str(path)])).redteam


def test_there_are_configs_of_every_kind():
    assert {kind(path) for path in CONFIGS} == {
        *("fit", "strategy", "sweep", "ablation", "redteam", "red team"),
        *("judge", "benchmark", "generation", "attacker", "search", "comparison", "study"),
        *("criteria", "prices"),
    }


@ignoring_deprecations
@pytest.mark.parametrize("path", of_kind("fit", at_once=[]))
def test_an_experiment_is_built_without_loading_anything(path, nothing_is_loaded, tmp_path):
    built = PatcherCLI("fit", ["--config", str(path), "--run_dir", str(tmp_path)])
    assert isinstance(built.options.redteam, RedTeam)
    assert built.trainer.max_steps > 0 or built.options.max_gradient_evaluations is not None


@ignoring_deprecations
@pytest.mark.parametrize("attacker", of_kind("attacker"))
def test_a_patcher_takes_an_attacker_by_its_path(attacker, nothing_is_loaded, tmp_path):
    path = ROOT / "configs/testbed/patcher.yaml"
    option = f"--model.init_args.attacker={attacker}"
    built = PatcherCLI("fit", ["--config", str(path), "--run_dir", str(tmp_path), option])
    attack = built.model.attack_source.attacker.draw(0, 0)
    assert attack.attacker.num_steps >= 60


def strategies_and_experiments():
    """Every experiment on one sharded strategy, and every strategy under one experiment.

    The testbed's have all defenses; the others are long.
    """
    usual, experiment = "strategies/fsdp2-8gpu.yaml", "testbed/sft.yaml"
    of_the_testbed = [name for name in NAMES if name.startswith("testbed/")]
    return [
        pytest.param(
            *strategy.values, *other.values, id=f"{strategy.id}-{other.id}", marks=other.marks
        )
        for strategy in of_kind("strategy")
        for other in of_kind("fit", at_once=of_the_testbed)
        if strategy.id == usual or other.id == experiment
    ]


@ignoring_deprecations
@pytest.mark.parametrize(("path", "experiment"), strategies_and_experiments())
def test_a_strategy_is_built_on_top_of_an_experiment(
    path, experiment, nothing_is_loaded, tmp_path, monkeypatch
):
    """On a machine that has these GPUs, which is as far as one without them can be told."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
    devices, num_nodes = content["devices"], content.get("num_nodes", 1)
    for name, value in {"is_available": True, "device_count": devices}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: devices)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._check_cuda_matmul_precision", ...)
    files = ["--config", str(experiment), "--config", str(path)]
    arguments = [*files, "--run_dir", str(tmp_path)]
    text = experiment.read_text(encoding="utf-8")
    refused = [message for name, message in ON_ONE_DEVICE.items() if name in text]
    if refused and devices > 1:
        with pytest.raises(ConfigError, match=refused[0]):
            PatcherCLI("fit", arguments)
        return
    built = PatcherCLI("fit", arguments)
    assert built.trainer.world_size == devices * num_nodes
    is_spread = shards(built.trainer) or replicates(built.trainer)
    assert is_spread == (devices * num_nodes > 1)


@pytest.mark.parametrize("path", of_kind("criteria"))
def test_criteria_are_built(path, tmp_path):
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    assert load_criteria(copied).criteria.criteria


@pytest.mark.parametrize("path", of_kind("prices"))
def test_prices_are_built(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--prices", type=Prices)
    assert parser.instantiate(parser.parse_args([f"--prices={path}"])).prices.tiers


@pytest.mark.parametrize("path", of_kind("red team"))
def test_a_red_team_is_built_without_loading_anything(path, nothing_is_loaded):
    assert isinstance(red_team(path), RedTeam)


@pytest.mark.parametrize("benchmark", of_kind("benchmark"))
@pytest.mark.parametrize("judge", of_kind("judge"))
def test_judges_and_benchmarks_fit_into_a_red_team(judge, benchmark, nothing_is_loaded, tmp_path):
    """By their file names, as the red team's own file would name them."""
    content = yaml.safe_load((ROOT / "configs/fragments/redteam.yaml").read_text(encoding="utf-8"))
    content |= {"judge": str(judge), "prompts": str(benchmark), "benign_prompts": str(benchmark)}
    path = write_yaml(tmp_path / "redteam.yaml", content)
    team = red_team(path)
    assert isinstance(team.judge, Judge)
    assert isinstance(team.prompts, Benchmark)
    assert team.benign_prompts == team.prompts


@pytest.mark.parametrize("preset", of_kind("generation"))
def test_a_red_team_takes_a_generation_preset_by_its_path(preset, tmp_path):
    path = next(path for path in CONFIGS if kind(path) == "red team")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | {"generation": str(preset)}
    team = red_team(write_yaml(tmp_path / "redteam.yaml", content))
    for name, value in yaml.safe_load(preset.read_text(encoding="utf-8")).items():
        assert getattr(team.generation, name) == value


@pytest.mark.parametrize("path", of_kind("redteam"))
def test_options_of_the_red_team_command_are_built(path, nothing_is_loaded):
    parser = function_parser("redteam", run_redteam)
    arguments = ["--config", str(path), "--model", "m", "--run_dir", "r"]
    options = parser.instantiate(parser.parse_args(arguments))
    assert isinstance(options.redteam, RedTeam)


@ignoring_deprecations
@pytest.mark.parametrize(
    ("folder", "search", "num_cells"),
    [
        ("testbed", None, 31),
        *(("testbed", *param.values, 31) for param in of_kind("search")),
        ("smollm2-135m", None, 9),
    ],
)
def test_a_red_team_is_built_with_the_models_that_it_hardens(
    folder, search, num_cells, nothing_is_loaded, tmp_path
):
    """Wrong if an attack, the search or a `fit` named what does not exist, minutes into the run."""
    files = [ROOT / "configs" / folder / "redteam.yaml", *([search] if search else [])]
    parser = function_parser("redteam", run_redteam)
    options = parser.instantiate(parser.parse_args([f"--config={file}" for file in files]))
    assert (options.search is None) == (search is None)
    assert len(options.redteam.cells()) == num_cells * len(options.redteam.seeds)
    for target in options.models:
        if target.fit is None:
            assert target.from_scratch_seed is not None
            continue
        fit = Fit.plan(tmp_path, Path(target.fit), options.fit_options)
        PatcherCLI("fit", [*fit.arguments, "--run_dir", str(tmp_path)])


@ignoring_deprecations
@pytest.mark.parametrize("path", of_kind("sweep", at_once=["testbed/headline.yaml"]))
def test_every_run_of_a_sweep_is_built(path, nothing_is_loaded, tmp_path):
    """Wrong if an override of the sweep named an option that its base does not have."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = path.parent / content["base"]
    fits = plan_sweep(base, content["variants"], tmp_path, content["seeds"][:1])
    assert len({fit.digest for fit in fits}) == len(content["variants"])
    for fit in fits:
        PatcherCLI("fit", [*fit.arguments, "--run_dir", str(tmp_path)])


@ignoring_deprecations
@pytest.mark.parametrize("path", of_kind("ablation"))
@pytest.mark.long
def test_every_part_of_an_ablation_is_built(path, nothing_is_loaded, tmp_path):
    """Wrong if an estimator or an override named what does not exist, minutes into the run."""
    parser = function_parser("ablate", run_ablate)
    options = parser.instantiate(parser.parse_args(["--config", str(path), "--run_dir", "r"]))
    assert isinstance(options.comparison, ComparisonGrid)
    base, seeds = Path(options.base), options.seeds[:1]
    fits = list(plan_hardening(base, options.hardening, seeds, tmp_path).values())
    assert len({fit.digest for fit in fits}) == len(fits)
    for fit in [*fits, Fit.plan(tmp_path, base, options.trained)]:
        PatcherCLI("fit", [*fit.arguments, "--run_dir", str(tmp_path)])


@ignoring_deprecations
@pytest.mark.parametrize("path", of_kind("study"))
@pytest.mark.long
def test_every_defense_of_a_study_is_built_at_every_budget(path, nothing_is_loaded, tmp_path):
    """Wrong if an option that its defense does not have were heard of hours into the study."""
    parser = function_parser("scale", run_scale)
    options = parser.instantiate(parser.parse_args(["--config", str(path)]))
    redteam = Path(options.redteam)
    columns = [
        Column.plan(
            *(options.defenses, redteam, options.selection, options.seeds, budget),
            *(options.options, tmp_path / str(budget)),
        )
        for budget in options.budgets
    ]
    assert columns[-1].defenses.keys() == options.defenses.keys()
    assert len({len(own) for column in columns for own in column.searched.values()}) == 1
    for trials in columns[-1].searched.values():
        built = PatcherCLI("fit", [*trials[-1].fits[0].arguments, "--run_dir", str(tmp_path)])
        assert built.options.max_gradient_evaluations == max(options.budgets)
    assert len(options.seeds) == 5
    team = red_team(redteam)
    assert len(team.cells()) >= 6
    assert team.stop_after_break is not None


@ignoring_deprecations
@pytest.mark.parametrize("path", of_kind("comparison", at_once=["testbed/comparison.yaml"]))
def test_every_trial_of_a_comparison_is_built_and_every_defense_is_in_one(
    path, nothing_is_loaded, tmp_path
):
    """Wrong if a space named an option that its defense does not have, minutes into the run."""
    parser = function_parser("compare", run_compare)
    options = parser.instantiate(parser.parse_args(["--config", str(path)]))
    common = {"max_gradient_evaluations": options.max_gradient_evaluations, **options.options}
    trials = plan_trials(options.defenses, options.selection, common, tmp_path)
    trained = set()
    for own in trials.values():
        # They differ in values alone: one stands for all.
        assert len({tuple(trial.options) for trial in own}) == 1
        built = PatcherCLI("fit", [*own[-1].fits[0].arguments, "--run_dir", str(tmp_path)])
        trained.add(type(built.model).__name__)
        assert built.options.redteam.seeds == options.selection.seeds[:1]
    if path == ROOT / "configs" / "testbed" / "comparison.yaml":
        assert trained == set(defenses.__all__) - {"Defense"}
    assert len(options.seeds) == 5
    assert len(red_team(Path(options.redteam)).cells()) >= 3
