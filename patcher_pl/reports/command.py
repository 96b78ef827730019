"""The `report` command: results of one or several runs as one page, and their table for papers."""

from collections.abc import Sequence
from pathlib import Path

from patcher_pl.errors import ConfigError, DataError
from patcher_pl.files import write_text


def run_report(
    dirs: Sequence[Path],
    out: Path = Path("report.html"),
    title: str = "Does the defense hold?",
    baseline: str | None = None,
    num_samples: int = 6,
) -> None:
    """Writes a report on the attacks of one or several runs.

    One HTML page that needs nothing else, and beside it the table of defenses and attacks as
    `.csv`, `.md` and `.tex`. Runs are merged; a defense that several of them attacked in the same
    way, but with other outcomes, is told apart by run.

    Args:
        dirs: Run directories of `fit`, `redteam` or `sweep`, or results files of any program that
            keeps to `patcher_pl/reports/results.schema.json`.
        out: The page; its name ends in `.html`.
        title: Heading of the page.
        baseline: Defense that the others are compared with; null takes the control `sft`, and where
            there is none, compares all with each other.
        num_samples: Sample answers shown per defense and attack (count, >= 0).

    Raises:
        ConfigError: If an option has a value that does not fit.
        DataError: If a directory has no results, or a file cannot be used.
    """
    from patcher_pl.reports.grouping import labels
    from patcher_pl.reports.overview import (
        overview,
        overview_csv,
        overview_latex,
        overview_markdown,
    )
    from patcher_pl.reports.page import render_page
    from patcher_pl.reports.runs import load_runs, merge_runs
    from patcher_pl.reports.statistics import compare_all

    if out.suffix != ".html":
        raise ConfigError(f"--out must end in .html, got {out}. Try {out.with_suffix('.html')}.")
    if num_samples < 0:
        raise ConfigError(f"--num_samples must be >= 0, got {num_samples}. Use 0 to show none.")
    runs = load_runs(dirs)
    curves, notes = merge_runs(runs)
    if not curves:
        raise DataError(
            f"{', '.join(str(run.path) for run in runs)}: no attack has been run yet. "
            "Let the run finish its first attack."
        )
    frame = overview(curves)
    groups = list(frame["group"])
    known = {name.lower() for group in groups for name in (group.defense, group.label)}
    if baseline is not None and baseline.lower() not in known:
        raise ConfigError(
            f"--baseline must be a defense of these runs, got {baseline!r}. "
            f"There are: {', '.join(labels(groups))}."
        )
    comparisons = compare_all(groups, baseline)
    if any(group.bounded_differs for group in groups):
        comparisons += compare_all(groups, baseline, is_bounded=True)
    page = render_page(
        frame,
        curves,
        runs,
        comparisons,
        title=title,
        notes=notes,
        num_samples=num_samples,
    )
    write_text(out, page)
    write_text(out.with_suffix(".csv"), overview_csv(frame))
    write_text(out.with_suffix(".md"), overview_markdown(frame))
    write_text(out.with_suffix(".tex"), overview_latex(frame))
    print(f"Written to {out}, and the table to {out.stem}.csv, .md and .tex beside it.")
