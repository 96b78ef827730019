"""Curves as the potions world gives them."""

import pytest

from patcher_pl.reports import Curve

STEPS = [0, 20, 40, 80, 160]


def make_curve(defense, k1, asr, steps_to_break, **changes):
    asr = [None if rate is None else float(rate) for rate in asr]
    fields = {
        "defense": defense,
        "k1": k1,
        "seed": 0,
        "attack": "full_adamw",
        "attack_steps": STEPS[: len(asr)],
        "asr": asr,
        "benign_accuracy": [1.0] * len(asr),
        "steps_to_break": steps_to_break,
        "threshold": 0.5,
    }
    return Curve(**(fields | changes))


@pytest.fixture
def curve():
    return make_curve


@pytest.fixture
def headline():
    """Two seeds of the control and of three k1, in no particular order."""
    return [
        make_curve("patcher", 120, [0, 0, 0, 0, 0.2], None, seed=1),
        make_curve("patcher", 120, [0, 0, 0, 0, 1.0], 160),
        make_curve("patcher", 2, [0, 1, 1, 1, 1], 20),
        make_curve("patcher", 40, [0, 0, 0.1, 1, 1], 80, benign_accuracy=[1.0, 1.0, 1.0, 1.0, 0.9]),
        make_curve("sft", None, [0, 1, 1, 1, 1], 20),
        make_curve("sft", None, [0, 0.4, 0.9, 1, 1], 40, seed=1),
    ]
