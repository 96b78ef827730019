"""What longer attacks add to an estimate of a hypergradient."""

import pytest

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.hypergradients import Adjoint
from patcher_pl.hypergradients.trajectories import FullState
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.planning.attacks import toy_estimate


def test_every_step_of_a_kept_trajectory_takes_four_copies_of_the_weights():
    """Wrong if the rehearsal's two attack steps were taken for the real number. States are parameters
    and two moments; gradients are kept as well."""
    attacker = FineTuningAttacker(num_steps=5, optimizer=AdamW(lr=1e-3))
    adjoint = Adjoint(store=FullState(device="model"))
    defense = Patcher(LanguageModel(path="moon/root"), attacker, hypergradient=adjoint)
    assert defense.attack_source is not None
    ten, twenty = (toy_estimate(defense.attack_source, steps) for steps in (10, 20))
    assert twenty[0] - ten[0] == pytest.approx(40, rel=0.05)  # Copies of the weights.
    assert twenty[1] > ten[1] + 10  # Gradient evaluations.
