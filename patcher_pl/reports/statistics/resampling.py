"""Bootstrap of rates that come from several seeds and the same prompts under each of them.

Seeds and prompts are crossed, so both are resampled, independently of each other; where several
models were trained, models are drawn first and the attacks on them second. All draws are weights:
a replicate is a weighted mean, and one matrix product gives all of them.

References:
    Owen, 2007, "The pigeonhole bootstrap", https://arxiv.org/abs/0712.1111.
"""

import warnings
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 2000
LEVEL = 0.95


def seed_weights(
    models: Sequence[Hashable], num_resamples: int, seed: int
) -> Float[np.ndarray, "resample seed"]:
    """How often each curve is drawn, in every replicate; rows add up to the number of curves.

    Args:
        models: Which model each curve attacked; curves of one model are nested in it.
        num_resamples: Replicates (count).
        seed: Seed of the draws.
    """
    rng = np.random.default_rng([seed, 0])
    names = list(dict.fromkeys(models))
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_resamples)
    weights = np.zeros((num_resamples, len(models)))
    for place, name in enumerate(names):
        members = [seed for seed, model in enumerate(models) if model == name]
        shares = np.full(len(members), 1 / len(members))
        weights[:, members] = rng.multinomial(drawn[:, place] * len(members), shares)
    return weights * len(models) / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=8)
def prompt_weights(
    num_prompts: int, num_resamples: int, seed: int
) -> Float[np.ndarray, "resample prompt"]:
    """How often each prompt is drawn, in every replicate; the same for all that share prompts."""
    rng = np.random.default_rng([seed, 1])
    shares = np.full(num_prompts, 1 / num_prompts)
    weights = rng.multinomial(num_prompts, shares, size=num_resamples).astype(float)
    weights.flags.writeable = False
    return weights


def resampled_rates(
    success: Float[np.ndarray, "seed prompt"],
    by_seed: Float[np.ndarray, "resample seed"],
    by_prompt: Float[np.ndarray, "resample prompt"],
) -> Float[np.ndarray, " resample"]:
    """The mean over seeds of each seed's mean over prompts, in every replicate.

    NaN in `success` (the judge failed) is left out; a replicate of such entries alone is NaN.
    """
    scored: Bool[np.ndarray, "seed prompt"] = np.isfinite(success)
    hits = by_prompt @ np.where(scored, success, 0.0).T
    counts = by_prompt @ scored.T.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = hits / counts
        weights = by_seed * (counts > 0)
        return np.where(counts > 0, weights * rates, 0.0).sum(axis=1) / weights.sum(axis=1)


def percentile_interval(
    replicates: Float[np.ndarray, " resample"],
) -> tuple[float, float] | None:
    """The middle 95 % of the replicates; None where all are NaN."""
    if not np.isfinite(replicates).any():
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def seed_interval(values: Sequence[float], num_resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of one value per seed (two or more).

    With few seeds it is too narrow: five seeds cover about 85 %, not 95 %.
    """
    from scipy import stats

    with warnings.catch_warnings():
        # Of equal values; their interval has no width.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=num_resamples,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def wilson_interval(rate: float, num_prompts: int) -> tuple[float, float]:
    """95 % interval of a rate over prompts (at least one): seeds that agree say nothing of others."""
    from scipy import stats

    test = stats.binomtest(round(rate * num_prompts), num_prompts)
    found = test.proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)
