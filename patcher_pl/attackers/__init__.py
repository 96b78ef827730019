"""The simulated (train-time) attacker and the fine-tuning loop that every attack shares."""

from patcher_pl.attackers.base import Attacker, AttackOutcome, DrawnAttack
from patcher_pl.attackers.carry import Carried, Carry
from patcher_pl.attackers.combine import Combine, combined
from patcher_pl.attackers.concurrent import ConcurrentAttacker, Member
from patcher_pl.attackers.distribution import AttackDistribution, Kind
from patcher_pl.attackers.fine_tuning import FineTuningAttacker
from patcher_pl.attackers.growth import Growth
from patcher_pl.attackers.inner_problem import InnerProblem
from patcher_pl.attackers.loop import FinetuneStep, finetune

__all__ = [
    "AttackDistribution",
    "AttackOutcome",
    "Attacker",
    "Carried",
    "Carry",
    "Combine",
    "ConcurrentAttacker",
    "DrawnAttack",
    "FineTuningAttacker",
    "FinetuneStep",
    "Growth",
    "InnerProblem",
    "Kind",
    "Member",
    "combined",
    "finetune",
]
