"""Options of the `redteam` command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher_pl.cli.console import write_reports
from patcher_pl.cli.errors import readable_config_errors
from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.jobs import Engine, InProcess, OptionValue, RunDirectory
from patcher_pl.launcher import num_processes
from patcher_pl.models.language_model import DtypeName, LanguageModel
from patcher_pl.models.sharding import Sharding
from patcher_pl.redteam.board import Board, require_verdicts
from patcher_pl.redteam.job import AttackedModel, Bench
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.redteam.search import Search
from patcher_pl.redteam.target import Target, harden, require_distinct
from patcher_pl.redteam.together import Together, follow, leading
from patcher_pl.redteam.variation import require_settings
from patcher_pl.reports.results import Results
from patcher_pl.reports.settings import as_settings


def run_redteam(
    redteam: RedTeam,
    run_dir: Path,
    model: str | None = None,
    models: list[Target] | None = None,
    search: dict[str, Any] | Search | None = None,
    engine: Engine | None = None,
    sharding: Sharding | None = None,
    chat: ChatFormat | None = None,
    dtype: DtypeName = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    device: str = "auto",
    num_threads: int | None = None,
    defense: str = "model",
    sibling: str | None = None,
    k1: int | None = None,
    train_seed: int | None = None,
    fit_options: dict[str, OptionValue] | None = None,
) -> Results | None:
    """Attacks models with a red team and reports how their safety holds.

    Several processes that torchrun or srun has started, or an engine for each attack, hold a model
    together, spread with FSDP2, and attack it together.

    Every attack with every seed on every model leaves a file below `run_dir/cells`, whole or not at
    all. At the end come `results.json`, `results.csv`, `asr.png` and `asr.svg` (and of a search,
    `saturation.png` and `.svg`), and a table on the terminal. The same command goes on where it was interrupted, and repeats only attacks that
    failed, or whose settings changed, or the content of what they name: model, data, prompts, rubric.
    Answers that the judge failed on are kept, and judged again by the same command.

    Args:
        redteam: Attacks, their grid, their data, the prompts and the judge.
        run_dir: Where everything goes; created when missing.
        model: Hub id, local directory, or `testbed`: the only model; whole, or a PEFT adapter, which
            is merged into its base. `models` takes several.
        models: Models to attack alike.
        search: Look for the strongest attack on every model, starting from the grid, see
            `patcher_pl.redteam.Search`; settings may stand beside `num_trials`. None without.
        engine: What runs the attacks; one after the other in this process unless given.
        sharding: How a model is spread over several processes.
        chat: How conversations become tokens; as in training, or the model meets a strange prompt.
        dtype: Number format of the attacked weights.
        attn_implementation: Attention of transformers; null takes the model's default.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint.
        gguf_file: Name of the GGUF file in `model` to attack; needs `patcher-pl[gguf]`.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        num_threads: CPU threads of torch, of each process; null leaves it to torch. Tiny models
            want 1.
        defense: Name of the defense of `model` in the results.
        sibling: Hub id or directory of another public release of `model`, such as its base, for attacks
            that go back to it (`DeltaStrip`).
        k1: Simulated attack steps that `model` was trained against, for the results.
        train_seed: Seed that `model` was trained with, for the results.
        fit_options: Options of `fit` (dotted names) that differ for models that it makes.

    Returns:
        What was written to `results.json`; None on all but the first of several processes.

    Raises:
        ConfigError: If not exactly one of `model` and `models` is given, names clash, or a model,
            device or engine cannot be used.
        DataError: If prompts or data cannot be used.
        PatcherError: If every attack failed, or nothing that one measured was scored.
        RunInterrupted: If a signal stopped it; finished attacks are kept.
    """
    if (model is None) == (models is None):
        raise ConfigError(f"model or models must be given, and not both, got {model} and {models}.")
    with readable_config_errors():
        # A mapping may name any setting of an attack, which no signature lists.
        search = Search(**search) if isinstance(search, dict) else search
        require_settings("search", search.space if search else {}, redteam.attacks)
    if gguf_file is not None and model is None:
        raise ConfigError("gguf_file belongs to `model`; in `models`, give every Target its own.")
    if sibling is not None and model is None:
        raise ConfigError("sibling belongs to `model`; in `models`, give every Target its own.")
    targets = models or [
        Target(
            defense=defense,
            path=model,
            k1=k1,
            train_seed=train_seed,
            gguf_file=gguf_file,
            sibling=sibling,
        )
    ]
    require_distinct(targets)

    def attack(bench: Bench, runner: Engine, device: str) -> Results:
        overlap = redteam.shared_data({})  # Before hours are spent on making models.
        found = harden(targets, run_dir, fit_options or {}, engine)
        attacked = []
        for target, one in zip(targets, found, strict=True):
            language_model = LanguageModel(
                path=one.path,
                chat=target.chat or chat or ChatFormat(),
                dtype=dtype,
                attn_implementation=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
                sharding=sharding or Sharding(),
                revision=revision,
                trust_remote_code=trust_remote_code,
                gguf_file=target.gguf_file,
                from_scratch_seed=target.from_scratch_seed,
            )
            attacked.append(
                AttackedModel(
                    name=target.name,
                    language_model=language_model,
                    bench=bench,
                    sibling=one.sibling(target, language_model),
                )
            )
        board = Board(
            run_directory=RunDirectory(run_dir),
            engine=runner,
            device=device,
            num_threads=num_threads,
            settings=as_settings({"redteam": redteam, "models": targets, "search": search}),
            overlap=overlap,
        )
        title = ", ".join(target.defense if model is None else str(model) for target in targets)
        return _attacked(board, redteam, attacked, search, f"Red team of {title}")

    if num_processes() == 1:
        runner = engine or InProcess()
        if runner.processes_per_job > 1:
            from patcher_pl.cli.spread_attacks import Spread

            runner = Spread(engine=runner)
        return attack(Bench(), runner, device)
    from patcher_pl.cli.launched import launched

    _require_one_kind_of_processes(engine, targets)
    with launched(device) as (mesh, place):
        bench = Bench(mesh=mesh)
        if mesh.get_rank() > 0:
            follow(bench, place)
            return None
        with leading():
            return attack(bench, Together(), place)


def _attacked(
    board: Board,
    redteam: RedTeam,
    attacked: Sequence[AttackedModel],
    search: Search | None,
    title: str,
) -> Results:
    """Runs everything on a board and reports it."""
    board.claim()
    curves = board.attack(redteam, attacked)
    if search is not None:
        board.search(search, redteam, attacked, curves)
    saved = board.save()
    curves, root = saved.curves, board.run_directory.root
    write_reports(curves, root, title=title, searches=saved.searches)
    results = board.run_directory.results
    if all(curve.error is not None for curve in curves):
        raise PatcherError(f"Every attack failed; the first with {curves[0].error}. See {results}.")
    require_verdicts(curves)
    return Results.load(results)


def _require_one_kind_of_processes(engine: Engine | None, targets: Sequence[Target]) -> None:
    if engine is not None:
        raise ConfigError(
            f"engine: the processes that a launcher has started attack together, got {engine}. Leave "
            "it away, or start one process."
        )
    for target in targets:
        if target.fit is not None:
            raise ConfigError(
                f"Target.fit: {target.fit} would be trained by each of {num_processes()} processes. "
                "Train it first, and give the path of the model."
            )
