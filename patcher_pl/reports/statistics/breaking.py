"""What it takes to break a defense, where some attacks never did within their budget."""

from dataclasses import dataclass

import numpy as np

from patcher_pl.reports.costs import CostAxis, costs
from patcher_pl.reports.grouping import Group


@dataclass(frozen=True, kw_only=True)
class BreakCost:
    """What it took to break a defense, over the seeds of a group; some may never have broken.

    Args:
        median: Kaplan and Meier's median: the smallest cost at which half of the seeds are expected
            to be broken; None where that is beyond what was measured.
        restricted_mean: Mean of the cost to break or `horizon`, whichever is smaller: what an
            attacker with that budget spends. A lower bound of the mean where a seed held.
        horizon: Largest cost that was measured.
        num_broken: Seeds that broke (count).
        num_seeds: Seeds (count).
    """

    median: float | None
    restricted_mean: float
    horizon: float
    num_broken: int
    num_seeds: int

    @property
    def is_bound(self) -> bool:
        """Whether a seed held, so that `restricted_mean` is only a lower bound."""
        return self.num_broken < self.num_seeds


def cost_to_break(group: Group, axis: CostAxis = "steps") -> BreakCost | None:
    """Cost to break, with seeds that held counted as longer than measured, not as broken.

    None where no seed was measured or the cost was not counted. Breaking is known to the next
    measurement only, so costs are rounded up to it.

    References:
        Kaplan and Meier, 1958, J. Am. Stat. Assoc. 53.
    """
    from scipy import stats

    broken, held = [], []
    for curve in group.curves:
        known = costs(curve, axis)
        if not curve.attack_steps or len(known) < len(curve.attack_steps):
            continue
        if curve.steps_to_break in curve.attack_steps:
            broken.append(float(known[curve.attack_steps.index(curve.steps_to_break)]))
        else:
            held.append(float(known[-1]))
    if not broken and not held:
        return None
    horizon = max(broken + held)
    survival = stats.ecdf(stats.CensoredData(uncensored=broken, right=held)).sf
    reached = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
    # The area under the survival curve up to the horizon.
    edges = np.concatenate([[0.0], survival.quantiles])
    heights = np.concatenate([[1.0], survival.probabilities[:-1]])
    return BreakCost(
        median=float(reached[0]) if len(reached) else None,
        restricted_mean=float(np.sum(heights * np.diff(edges))),
        horizon=horizon,
        num_broken=len(broken),
        num_seeds=len(broken) + len(held),
    )
