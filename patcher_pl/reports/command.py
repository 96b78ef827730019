"""The `report` command: results of one or several runs as one page, and their table for papers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patcher_pl.errors import ConfigError, DataError, PatcherError
from patcher_pl.files import write_text
from patcher_pl.reports.prices import Prices

if TYPE_CHECKING:
    from patcher_pl.reports.results import Curve
    from patcher_pl.reports.runs import Run


def run_report(
    dirs: Sequence[Path],
    out: Path = Path("report.html"),
    title: str = "Does the defense hold?",
    baseline: str | None = None,
    num_samples: int = 6,
    prices: Prices | None = None,
    decision: Path | None = None,
    model_card: str | None = None,
    redact: bool = False,
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
        prices: What hardware costs, for a table of hours and money; null leaves it away.
        decision: File of criteria that the release must meet (see
            `patcher_pl.reports.decision.Criteria`): writes a page on them beside the other, and fails
            where one is not met. What was not tested is told, and is no failure.
        redact: Leave away everything that a model or an attacker said: answers, prompts, settings.
        model_card: Defense whose model gets a card beside the page: Markdown with the Hub's metadata.

    Raises:
        ConfigError: If an option has a value that does not fit.
        PatcherError: If a criterion is not met; everything is written.
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
    from patcher_pl.reports.redaction import redacted
    from patcher_pl.reports.runs import load_runs, merge_runs
    from patcher_pl.reports.statistics import compare_all

    if out.suffix != ".html":
        raise ConfigError(f"--out must end in .html, got {out}. Try {out.with_suffix('.html')}.")
    if num_samples < 0:
        raise ConfigError(f"--num_samples must be >= 0, got {num_samples}. Use 0 to show none.")
    runs = load_runs(dirs)
    runs = redacted(runs) if redact else runs
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
        prices=prices,
    )
    write_text(out, page)
    write_text(out.with_suffix(".csv"), overview_csv(frame))
    write_text(out.with_suffix(".md"), overview_markdown(frame))
    write_text(out.with_suffix(".tex"), overview_latex(frame))
    print(f"Written to {out}, and the table to {out.stem}.csv, .md and .tex beside it.")
    if model_card is not None:
        from patcher_pl.reports.grouping import curves_of
        from patcher_pl.reports.model_card import model_card as card_of

        own = curves_of(curves, model_card, None, "--model_card")
        # The run that holds the first of its curves says what was asked; merging may rename defenses.
        first = own[0]
        run = next(
            run
            for run in runs
            for one in run.results.curves
            if one.key[1:] == first.key[1:] and one.asr == first.asr
        )
        card = out.with_name(f"{out.stem}-model-card.md")
        write_text(card, card_of(own, run.results, name=model_card))
        print(f"Written to {card}")
    if decision is not None:
        _decide(decision, out, runs, curves, notes)


def _decide(
    decision: Path,
    out: Path,
    runs: "Sequence[Run]",
    curves: "Sequence[Curve]",
    notes: Sequence[str],
) -> None:
    from patcher_pl.reports.decision import decision_markdown, decision_page, judge, load_criteria
    from patcher_pl.reports.runs import load_runs, merge_runs, searches_of

    fixed = load_criteria(decision)
    earlier = fixed.criteria.earlier
    before = [] if earlier is None else merge_runs(load_runs([earlier.results]))[0]
    findings = judge(fixed.criteria, curves, searches_of(runs, curves), before)
    page = out.with_name(f"{out.stem}-decision.html")
    write_text(page, decision_page(fixed, findings, runs, notes))
    write_text(page.with_suffix(".md"), decision_markdown(fixed, findings, runs))
    for one in findings:
        why = f": {one.reason}" if one.reason else ""
        print(f"{one.status:>10}  {one.name} ({one.requirement}){why}")
    print(f"Written to {page}")
    if failed := [one.name for one in findings if one.status == "fail"]:
        raise PatcherError(
            f"{len(failed)} of {len(findings)} criteria failed: {', '.join(failed)}."
        )
