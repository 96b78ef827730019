"""The page that decides, and its text for a log or a pull request."""

import shlex
from collections.abc import Sequence
from typing import Any

from patcher_pl.reports.decision.criteria import QUESTIONS, Fixed
from patcher_pl.reports.decision.judging import Finding
from patcher_pl.reports.grouping import defense_label
from patcher_pl.reports.html import page_templates
from patcher_pl.reports.runs import Run
from patcher_pl.reports.tables import markdown_table, text_table

_COLUMNS = ["criterion", "required", "outcome", "found", "under", "why", "searched"]


def decision_page(
    fixed: Fixed, findings: Sequence[Finding], runs: Sequence[Run], notes: Sequence[str] = ()
) -> str:
    """Renders the page; everything that comes from files is escaped.

    Args:
        fixed: The criteria.
        findings: What became of them.
        runs: What they were held against.
        notes: What a reader must know about how runs came together.
    """
    return (
        page_templates()
        .get_template("decision.html.j2")
        .render(**_content(fixed, findings, runs), notes=notes)
    )


def decision_markdown(fixed: Fixed, findings: Sequence[Finding], runs: Sequence[Run]) -> str:
    """The same as Markdown."""
    content = _content(fixed, findings, runs)
    lines = [
        f"# {content['title']}",
        "",
        f"**{content['verdict']}** {content['counts']} of {content['model']}.",
        "",
        f"Criteria: {content['file']}, SHA-256 `{fixed.digest}`, first used {fixed.first_use}.",
    ]
    if fixed.changed_from:
        lines.append(f"The file held other criteria before ({len(fixed.changed_from)} times).")
    for question, found in content["sections"]:
        lines += ["", f"## {question}", ""]
        if not found:
            lines.append("Not tested: no criterion asks it.")
            continue
        lines.append(markdown_table(text_table(_COLUMNS, [_cells(one) for one in found]), 7))
    lines += ["", "## How to find the same", ""]
    lines += [f"    {command}" for command in content["commands"]]
    return "\n".join(lines) + "\n"


def _content(fixed: Fixed, findings: Sequence[Finding], runs: Sequence[Run]) -> dict[str, Any]:
    criteria = fixed.criteria
    number = {
        status: sum(one.status == status for one in findings)
        for status in ("pass", "fail", "not tested")
    }
    if number["fail"]:
        verdict = "Does not meet its criteria."
    elif number["not tested"]:
        verdict = "Undecided: not everything was tested."
    else:
        verdict = "Meets its criteria."
    commands = [shlex.join(map(str, run.results.environment.get("command") or [])) for run in runs]
    return {
        "title": criteria.title,
        "verdict": verdict,
        "counts": f"{number['pass']} met, {number['fail']} failed, {number['not tested']} not tested,",
        "model": defense_label(criteria.defense, criteria.k1),
        "file": fixed.path.name,
        "digest": fixed.digest,
        "first_use": fixed.first_use,
        "changed_from": fixed.changed_from,
        "sections": [
            (text, [one for one in findings if one.question == question])
            for question, text in QUESTIONS.items()
        ],
        "commands": [command for command in dict.fromkeys(commands) if command],
    }


def _cells(finding: Finding) -> list[str]:
    return [
        *(finding.name, finding.requirement, finding.status, finding.figure or "-"),
        *(finding.attack or "-", finding.reason or "-", finding.searched),
    ]
