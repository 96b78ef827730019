"""The `redteam` command: attack a released model and write down what happened."""

from dataclasses import replace
from pathlib import Path

from patcher_pl.data.chat import ChatFormat
from patcher_pl.devices import choose_device
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.files import write_text
from patcher_pl.models.language_model import DtypeName, LanguageModel
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.reports.curves import asr_figure, save_figure
from patcher_pl.reports.environment import environment
from patcher_pl.reports.results import Curve, Results
from patcher_pl.reports.settings import as_settings, fingerprint, weight_files
from patcher_pl.reports.tables import to_csv, to_rich
from patcher_pl.testbed.cache import resolve_model
from patcher_pl.threads import cpu_threads


def run_redteam(
    model: str,
    redteam: RedTeam,
    run_dir: Path,
    chat: ChatFormat | None = None,
    dtype: DtypeName = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    defense: str = "model",
    k1: int | None = None,
    train_seed: int | None = None,
) -> Results:
    """Attacks a model with a red team and reports how its safety holds.

    Writes `results.json` after every attack, and at the end `results.csv`, `asr.png` and `asr.svg`
    into `run_dir`; prints a table. The same command goes on where it was interrupted, and repeats
    only attacks that failed.

    Args:
        model: Hub id, local directory, or `testbed`.
        redteam: Attacks, their data, the prompts and the judge.
        run_dir: Where everything goes; created when missing.
        chat: How conversations become tokens; as in training, or the model meets a strange prompt.
        dtype: Number format of the attacked weights.
        attn_implementation: Attention of transformers; null takes the model's default.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        num_threads: CPU threads of torch; null leaves it to torch. Tiny models want 1.
        defense: Name of the model's defense in the results.
        k1: Simulated attack steps that it was trained against, for the results.
        train_seed: Seed that it was trained with, for the results.

    Returns:
        What was written to `results.json`.

    Raises:
        ConfigError: If `run_dir` holds results of other settings, or the model or device cannot be
            used.
        PatcherError: If every attack failed.
    """
    language_model = LanguageModel(
        path=model,
        chat=chat or ChatFormat(),
        dtype=dtype,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    settings = as_settings(
        {
            "model": language_model,
            "weight_files": weight_files(Path(resolve_model(model))),
            "redteam": redteam,
            "defense": defense,
            "k1": k1,
            "train_seed": train_seed,
        }
    )
    path = run_dir / "results.json"
    earlier = _earlier_curves(path, fingerprint(settings))
    place = choose_device(device)
    results = Results(
        curves=earlier,
        environment=environment(),
        settings=settings,
        fingerprint=fingerprint(settings),
    )

    def save(curve: Curve) -> None:
        nonlocal results
        others = [known for known in results.curves if known.key != curve.key]
        results = replace(results, curves=[*others, curve])
        results.save(path)

    with cpu_threads(num_threads):
        curves = redteam.run(
            language_model.load_model().to(place),  # type: ignore[arg-type]
            language_model.load_tokenizer(),
            language_model.chat,
            defense=defense,
            k1=k1,
            train_seed=train_seed,
            on_cell=save,
            done=earlier,
        )
    results = replace(results, curves=curves)
    results.save(path)
    write_reports(curves, run_dir, title=f"Red team of {model}")
    if all(curve.error is not None for curve in curves):
        raise PatcherError(f"Every attack failed; the first with {curves[0].error}. See {path}.")
    return results


def write_reports(curves: list[Curve], run_dir: Path, title: str) -> None:
    """Writes `results.csv`, `asr.png` and `asr.svg` into `run_dir` and prints the table."""
    from rich.console import Console

    write_text(run_dir / "results.csv", to_csv(curves))
    figure = asr_figure(curves)
    save_figure(figure, run_dir / "asr.png")
    save_figure(figure, run_dir / "asr.svg")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # A log file has no width of its own.
    console.print(to_rich(curves, title=title))
    console.print(f"Written to {run_dir}", highlight=False, soft_wrap=True)


def _earlier_curves(path: Path, digest: str) -> list[Curve]:
    """Curves of an interrupted run of the same settings; none where there is no file."""
    if not path.exists():
        return []
    results = Results.load(path)
    if results.fingerprint != digest:
        raise ConfigError(
            f"{path} holds results of other settings or of another model. "
            "Give another --run_dir, or move the file away."
        )
    return results.curves
