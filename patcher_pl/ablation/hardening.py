"""Models that are hardened with one estimator each, at equal compute, and how they held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher_pl.jobs import Fit, OptionValue, seed_options
from patcher_pl.reports.ablation import Hardened
from patcher_pl.reports.grouping import CONTROL
from patcher_pl.validation import require

# Hardening ends by its budget, not after a number of steps.
_UNTIL_SPENT = {"trainer.max_steps": -1, "trainer.max_epochs": -1}


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """Models to be hardened with each estimator, at equal compute.

    Args:
        variants: Name of each, and the options of `fit` by which it differs from the base.
        budgets: Gradient evaluations after which training ends (counts, >= 1 each).

    Raises:
        ValueError: If there is no variant or a budget is below 1.
    """

    variants: Mapping[str, Mapping[str, OptionValue]]
    budgets: list[int]

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError(
                "Hardening.variants must not be empty, got none. Use `hardening: null` to skip it."
            )
        remedy = "Give numbers of gradient evaluations."
        require(self, min(self.budgets, default=0) >= 1, "budgets", ">= 1 each", remedy)


Key = tuple[str, int, int]
"""Variant, budget and seed."""


def plan_hardening(
    base: Path, hardening: Hardening, seeds: Sequence[int], directory: Path
) -> dict[Key, Fit]:
    """The runs that harden the models of an ablation."""
    fits = {}
    for name, variant in hardening.variants.items():
        for budget in hardening.budgets:
            for seed in seeds:
                options = {**_UNTIL_SPENT, "max_gradient_evaluations": budget, **seed_options(seed)}
                place = directory / name / f"budget-{budget}" / f"seed-{seed}"
                fits[name, budget, seed] = Fit.plan(place, base, {**options, **variant})
    return fits


def hardened(fits: Mapping[Key, Fit]) -> list[Hardened]:
    """What finished runs found; the control of a run is a variant of its own."""
    rows = []
    for (variant, budget, seed), fit in fits.items():
        if not fit.is_done:
            continue
        results = fit.results
        for curve in results.curves:
            if not curve.attack_steps:
                continue
            is_control = curve.defense == CONTROL and variant != CONTROL
            rows.append(
                Hardened(
                    variant=CONTROL if is_control else variant,
                    budget=budget,
                    seed=seed,
                    gradient_evaluations=results.settings["gradient_evaluations"],
                    num_steps=None if is_control else results.settings["num_steps"],
                    attack=curve.attack,
                    steps_to_break=curve.steps_to_break,
                    longest_attack=curve.attack_steps[-1],
                    benign_accuracy=curve.at(curve.attack_steps[0], "benign_accuracy"),
                    benign_compliance=curve.at(curve.attack_steps[0], "benign_compliance"),
                )
            )
    return rows
