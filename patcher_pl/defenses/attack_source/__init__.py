"""Where attacked weights come from: attacks in between, beside, differentiated, or along the way."""

from typing import Any

from patcher_pl.attackers import Attacker, Combine, ConcurrentAttacker
from patcher_pl.attackers.combine import COMBINATIONS
from patcher_pl.defenses.attack_source.along_the_way import AlongTheWay
from patcher_pl.defenses.attack_source.base import AttackSource
from patcher_pl.defenses.attack_source.concurrent import Concurrent
from patcher_pl.defenses.attack_source.fresh import Fresh
from patcher_pl.defenses.attack_source.in_between import InBetween
from patcher_pl.defenses.attack_source.refresh import AdaptiveRefresh
from patcher_pl.hypergradients import FirstOrder, Hypergradient
from patcher_pl.models import LanguageModel
from patcher_pl.validation import require


def attack_source(
    owner: str,
    language_model: LanguageModel,
    attacker: Attacker,
    *,
    refresh_every: int,
    num_sft_steps: int | None = None,
    hypergradient: Hypergradient | None = None,
    trust_every: int | None = None,
    combine_points: Combine = "average",
    adaptive_refresh: AdaptiveRefresh | None = None,
) -> AttackSource:
    """Returns the source that the settings of a defense ask for; they are explained at `Patcher`.

    `owner` is the class of the defense, for messages. What kind of source it is, attacker and
    hypergradient decide.

    Raises:
        ValueError: If a value is out of its range, or no source can do all that is asked for.
    """

    def check(value: Any, field: str, holds: bool, rule: str, remedy: str) -> None:
        require(owner, holds, field, rule, remedy, value=value)

    first = refresh_every if num_sft_steps is None else num_sft_steps
    estimator = FirstOrder() if hypergradient is None else hypergradient
    is_fresh = not isinstance(estimator, FirstOrder)
    measures = trust_every is None or (trust_every >= 1 and is_fresh)
    combinations = f"one of {', '.join(COMBINATIONS)}"
    rule = ">= 1 with a `hypergradient` other than FirstOrder, or null"
    remedy = "Use 1 to attack before every step."
    check(refresh_every, "refresh_every", refresh_every >= 1, ">= 1", remedy)
    check(first, "num_sft_steps", first >= 0, ">= 0 or null", "Use 0 to attack from the first on.")
    check(trust_every, "trust_every", measures, rule, "Use null to save the attacks.")
    is_known, remedy = combine_points in COMBINATIONS, "Use in_turn for the cheapest steps."
    check(combine_points, "combine_points", is_known, combinations, remedy)
    rounds = {"refresh_every": refresh_every, "num_sft_steps": first}
    if not is_fresh and not isinstance(attacker, ConcurrentAttacker):
        return InBetween(attacker, combine=combine_points, adaptive=adaptive_refresh, **rounds)
    rule = "null with this attacker and `hypergradient`, whose rounds have one length"
    check(
        adaptive_refresh, "adaptive_refresh", adaptive_refresh is None, rule, "Set `refresh_every`."
    )
    if is_fresh:
        lora = language_model.lora
        return Fresh(owner, attacker, estimator, trust_every=trust_every, lora=lora, **rounds)
    assert isinstance(attacker, ConcurrentAttacker)
    rule = "average with a ConcurrentAttacker, whose members give one vector each"
    remedy = "Set `attacker.combine`, which is for vectors of several members."
    check(combine_points, "combine_points", combine_points == "average", rule, remedy)
    return Concurrent(owner, attacker, **rounds)


__all__ = [
    "AdaptiveRefresh",
    "AlongTheWay",
    "AttackSource",
    "Concurrent",
    "Fresh",
    "InBetween",
    "attack_source",
]
