"""Where attacked weights come from: attacks in between, beside, differentiated, or along the way."""

from patcher_pl.attackers import Attacker, Combine, ConcurrentAttacker
from patcher_pl.attackers.combine import COMBINATIONS
from patcher_pl.defenses.attack_source.along_the_way import AlongTheWay
from patcher_pl.defenses.attack_source.base import AttackSource
from patcher_pl.defenses.attack_source.concurrent import Concurrent
from patcher_pl.defenses.attack_source.fresh import Fresh
from patcher_pl.defenses.attack_source.in_between import InBetween
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
) -> AttackSource:
    """Returns the source that settings ask for; each is explained at `Patcher`.

    Args:
        owner: Class of the defense whose settings they are, for messages.
        language_model: The model to harden.
        attacker: The simulated attack.
        refresh_every: Defender steps for which an attack is used.
        num_sft_steps: Defender steps before the first attack; None takes `refresh_every`.
        hypergradient: How the outer loss is differentiated; None for `FirstOrder`.
        trust_every: Fresh estimates from one measurement of trust to the next.
        combine_points: How the vectors of one attack are used.

    Raises:
        ValueError: If a value is out of its range, or no source can do all of it.
    """
    require(
        owner,
        refresh_every >= 1,
        "refresh_every",
        ">= 1",
        "Use 1 to attack before every step.",
        value=refresh_every,
    )
    first = refresh_every if num_sft_steps is None else num_sft_steps
    require(
        owner,
        first >= 0,
        "num_sft_steps",
        ">= 0 or null",
        "Use 0 to attack from the first step on.",
        value=first,
    )
    estimator = FirstOrder() if hypergradient is None else hypergradient
    is_fresh = not isinstance(estimator, FirstOrder)
    require(
        owner,
        trust_every is None or (trust_every >= 1 and is_fresh),
        "trust_every",
        ">= 1 with a `hypergradient` other than FirstOrder, or null",
        "Use null to save the attacks.",
        value=trust_every,
    )
    require(
        owner,
        combine_points in COMBINATIONS,
        "combine_points",
        f"one of {', '.join(COMBINATIONS)}",
        "Use in_turn for the cheapest steps.",
        value=combine_points,
    )
    rounds = {"refresh_every": refresh_every, "num_sft_steps": first}
    if is_fresh:
        lora = language_model.lora
        return Fresh(owner, attacker, estimator, trust_every=trust_every, lora=lora, **rounds)
    if isinstance(attacker, ConcurrentAttacker):
        require(
            owner,
            combine_points == "average",
            "combine_points",
            "average with a ConcurrentAttacker, whose members give one vector each",
            "Set `attacker.combine`, which is for vectors of several members.",
            value=combine_points,
        )
        return Concurrent(owner, attacker, **rounds)
    return InBetween(attacker, combine=combine_points, **rounds)


__all__ = [
    "AlongTheWay",
    "AttackSource",
    "Concurrent",
    "Fresh",
    "InBetween",
    "attack_source",
]
