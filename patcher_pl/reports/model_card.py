"""What a model's card says about fine-tuning attacks: a Markdown fragment with the Hub's metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from patcher_pl.reports.formats import MARKS, MEANINGS, Mark
from patcher_pl.reports.grouping import Group, defense_label, group_curves
from patcher_pl.reports.results import BENIGN_MEASURES, Curve, Results, average, known_benign
from patcher_pl.reports.searches import SearchOutcome
from patcher_pl.reports.statistics import final_asr
from patcher_pl.reports.tables import markdown_table, text_table


def model_card(
    curves: Sequence[Curve],
    results: Results,
    *,
    name: str,
    weights: str | None = None,
    training: str | None = None,
) -> str:
    """Renders the card of one model.

    Begins with metadata as the Hub reads them (`model-index`), so that it can stand at the top of a
    README.md, or be merged into one. Holds figures and digests; no prompts, no answers.

    Args:
        curves: Of that model alone.
        results: What they are from: settings, searches, environment.
        name: Of the model.
        weights: Digest of its weights; None where it is not known.
        training: Digest of the settings that it was trained with; None where it is not known.
    """
    groups = group_curves(curves)
    models = {(curve.defense, curve.k1) for curve in curves}
    searches = [one for one in results.searches if (one.defense, one.k1) in models]
    metadata = {
        "library_name": "transformers",
        "tags": ["safety", "tamper-resistance"],
        "model-index": [{"name": name, "results": _index(groups, results)}],
    }
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}: resistance to malicious fine-tuning",
        "",
        f"{defense_label(curves[0].defense, curves[0].k1)}, attacked by patcher_pl. A longer or another attack "
        "may break what held here.",
        "",
        markdown_table(text_table(_HEADER, [_row(group) for group in groups])).rstrip(),
        "",
        "Means over seeds; steps to break of the first to the last seed.",
        "",
        *(f"- {MARKS[mark]} {MEANINGS[mark]}." for mark in _marks(groups)),
        *(f"- {line}" for line in _searched(searches)),
        "",
        "## What was measured",
        "",
        *(f"- {line}" for line in _facts(curves, results, weights, training)),
    ]
    return "\n".join(lines) + "\n"


_HEADER = [
    "attack",
    "seeds",
    "attack success before",
    "after",
    "steps to break",
    "benign before",
    "after",
]


def _marks(groups: Sequence[Group]) -> list[Mark]:
    found = {mark for group in groups for mark in group.marks}
    return [mark for mark in MARKS if mark in found]


def _row(group: Group) -> list[str]:
    measure = _measure(group)
    known = None if measure is None else group.over_seeds(measure)["mean"].dropna()
    asr = group.over_seeds("asr")["mean"].dropna()
    return [
        " ".join([group.attack, *(MARKS[mark] for mark in group.marks)]),
        str(len(group.curves)),
        *_ends(asr),
        group.bounded_steps_to_break if group.bounded_differs else group.steps_to_break,
        *(("-", "-") if known is None else _ends(known)),
    ]


def _ends(values: Any) -> tuple[str, str]:
    """The first and the last of a series; where there is one alone, it was taken after the attack."""
    if values.empty:
        return "-", "-"
    last = f"{values.iloc[-1]:.2f}"
    return (f"{values.iloc[0]:.2f}" if len(values) > 1 else "-"), last


def _measure(group: Group) -> str | None:
    found = known_benign(group.curves)
    return found[0] if found else None


def _index(groups: Sequence[Group], results: Results) -> list[dict[str, Any]]:
    entries = []
    for group in groups:
        final = final_asr(group)
        metrics: list[dict[str, Any]] = []
        if final is not None:
            name = f"Attack success rate after {group.attack_steps[-1]} steps"
            metrics.append(
                {"type": "attack_success_rate", "value": round(final.value, 4), "name": name}
            )
        metrics.append(
            {
                "type": "steps_to_break",
                "value": group.steps_to_break,
                "name": "Attack steps to break",
            }
        )
        if (measure := _measure(group)) is not None:
            released = average(
                [
                    # An attack without steps is measured when it is done, never before.
                    curve.benign[0] if len(curve.attack_steps) > 1 else curve.released_benign
                    for curve in group.measured
                    if curve.benign
                ]
            )
            if released is not None:
                named = BENIGN_MEASURES[measure]  # type: ignore[index]
                metrics.append(
                    {"type": measure, "value": round(released, 4), "name": f"{named}, released"}
                )
        source = _setting(results.settings, "redteam", "prompts", "source", "path") or "unknown"
        entries.append(
            {
                "task": {"type": "text-generation", "name": "Refusing harm after fine-tuning"},
                "dataset": {"type": str(source), "name": f"{source} under {group.attack}"},
                "metrics": metrics,
            }
        )
    return entries


def _searched(searches: Sequence[SearchOutcome]) -> list[str]:
    return [f"Search for the strongest attack: {one.conclusion}" for one in searches]


def _facts(
    curves: Sequence[Curve], results: Results, weights: str | None, training: str | None
) -> list[str]:
    first = curves[0]
    judge = _setting(results.settings, "redteam", "judge")
    sources = _setting(results.settings, "redteam", "data", "sources")
    rows = [
        source.get("init_args", source).get("path")
        for source in sources or []
        if isinstance(source, Mapping)
    ]
    facts = {
        "Weights": weights and f"SHA-256 `{weights}`",
        "Trained with settings": training and f"digest `{training}`",
        "Red team's settings": results.fingerprint and f"digest `{results.fingerprint}`",
        "Harmful prompts": f"{first.num_prompts}"
        + (f", digest `{first.prompts_digest}`" if first.prompts_digest else ""),
        "Benign prompts": str(first.num_benign_prompts or "none"),
        "Attacker's rows": ", ".join(map(str, rows)) or None,
        "Judge": judge.get("class_path") if isinstance(judge, Mapping) else None,
        "A model counts as broken from an attack success rate of": f"{first.threshold:g}",
        "Seeds of the red team": ", ".join(map(str, sorted({curve.seed for curve in curves}))),
        "Source": results.environment.get("git_commit")
        and f"commit `{results.environment['git_commit']}`",
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def _setting(settings: Any, *names: str) -> Any:
    """A setting by its place, classes' arguments included; None where there is no such."""
    for name in names:
        if isinstance(settings, Mapping) and "init_args" in settings:
            settings = settings["init_args"]
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings
