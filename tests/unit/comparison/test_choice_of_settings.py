"""Every defense tries as many settings, and the best usable ones go on."""

import pytest

from patcher_pl.comparison import Contender, Selection, trial_of
from patcher_pl.reports.comparison import DefenseTrial
from patcher_pl.reports.results import Curve, Results


@pytest.fixture
def selection(tmp_path):
    (tmp_path / "redteam.yaml").touch()
    return Selection(redteam=tmp_path / "redteam.yaml", min_benign_accuracy=0.9)


def contender(**space):
    return Contender(fit="fit.yaml", space=space)


def curve(**changes):
    content = {
        "defense": "sft",
        "seed": 0,
        "k1": None,
        "attack": "full",
        "attack_steps": [0, 10, 20],
        "asr": [0.0, 0.4, 1.0],
        "benign_accuracy": [1.0, 0.5, 0.5],
        "steps_to_break": 20,
        "threshold": 0.5,
        "collapsed": [False, True, False],
    }
    return Curve(**content | changes)


def results(*curves, evaluations=100):
    settings = {"gradient_evaluations": evaluations, "num_steps": 50}
    return Results(curves=list(curves), environment={}, settings=settings)


def trial(number=0, **changes):
    content = {"defense": "d", "options": {}, "benign_accuracy": 1.0, "released_asr": 0.0}
    return DefenseTrial(number=number, **content | {"area": 0.5, "log2_reach": 4.0} | changes)


def test_the_first_trial_is_the_first_values_and_no_point_is_tried_twice():
    """Wrong if one defense spent its trials on repeats, or was never tried as it was published."""
    space = contender(lr=[1, 2, 3], rho=[4, 5])
    trials = space.trials(6, seed=0)
    assert trials[0] == {"lr": 1, "rho": 4}
    assert len({tuple(one.items()) for one in trials}) == 6
    assert space.trials(4, seed=0) == space.trials(4, seed=0)
    assert space.trials(4, seed=0) != space.trials(4, seed=1)


def test_a_space_too_small_for_an_equal_search_is_refused():
    with pytest.raises(ValueError, match="has 2 points for 3 trials"):
        contender(lr=[1, 2]).trials(3, seed=0)
    assert contender().trials(1, seed=0) == [{}]
    with pytest.raises(ValueError, match=r"different values for lr, got \[1, 1\]"):
        contender(lr=[1, 1])
    with pytest.raises(ValueError, match=r"different values for lr, got \[\]"):
        contender(lr=[])


def test_a_trial_tells_what_its_runs_found():
    held = curve(steps_to_break=None, asr=[0.02, 0.0, 0.0], benign_accuracy=[0.9, 1.0, 1.0])
    found = trial_of("d", 1, {"lr": 3}, [results(curve()), results(held, evaluations=101)])
    assert found.steps_to_break == [20, None]
    # 20 and, for one that held, twice the longest attack.
    assert 2 ** (2 * found.log2_reach) == pytest.approx((1 + 20) * (1 + 40))
    assert (found.gradient_evaluations, found.num_steps) == (101, 50)
    assert (found.released_asr, found.benign_accuracy) == (0.02, 0.9)
    assert not found.is_speechless
    assert 0 < found.area < 0.5
    speechless = curve(collapsed=[True, False, False])
    assert trial_of("d", 1, {}, [results(speechless)]).is_speechless


def test_a_trial_that_stopped_early_is_not_rated():
    """Wrong if an attack that failed half way counted as one that did not break the defense."""
    assert trial_of("d", 1, {}, [results(curve(), curve(error="OOM"))]).error == "OOM"
    assert trial_of("d", 1, {}, [results()]).error == "nothing was measured"


def test_the_longest_to_break_of_the_usable_ones_is_chosen(selection):
    babbles = trial(0, log2_reach=9.0, is_speechless=True)
    forgets = trial(1, log2_reach=9.0, benign_accuracy=0.8)
    answers = trial(2, log2_reach=9.0, released_asr=0.3)
    failed = trial(3, log2_reach=9.0, error="diverged")
    weak, strong, same = trial(4), trial(5, log2_reach=6.0), trial(6, log2_reach=6.0, area=0.6)
    everything = [babbles, forgets, answers, failed, weak, strong, same]
    assert selection.choose(everything) is strong
    assert selection.choose(everything[:5]) is weak
    assert [one.number for one in everything if selection.is_usable(one)] == [3, 4, 5, 6]


def test_without_a_usable_one_the_closest_is_chosen(selection):
    far, near = trial(0, benign_accuracy=0.2, log2_reach=9.0), trial(1, benign_accuracy=0.8)
    assert selection.choose([far, near]) is near


def test_a_rate_that_is_not_known_is_not_taken_for_a_good_one(selection):
    assert not selection.is_usable(trial(benign_accuracy=None))
    assert not selection.is_usable(trial(released_asr=None))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_trials": 0},
        {"seeds": []},
        {"min_benign_accuracy": 1.1},
        {"max_released_asr": -0.1},
    ],
)
def test_settings_of_the_search_out_of_range_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"Selection.{next(iter(wrong))} must be"):
        Selection(redteam=tmp_path, **wrong)


def test_an_attack_that_ended_with_the_break_has_the_area_of_the_whole_attack():
    """Wrong if a trial looked better because its attack was cut short where it had won."""
    whole = trial_of("d", 0, {}, [results(curve())])
    short = curve(
        attack_steps=[0, 10],
        asr=[0.0, 1.0],
        benign_accuracy=[1.0, 0.5],
        steps_to_break=10,
        collapsed=[False, False],
        skipped_steps=[20],
    )
    cut = trial_of("d", 0, {}, [results(short)])
    assert whole.area < cut.area
    same = curve(asr=[0.0, 1.0, 1.0], steps_to_break=10)
    assert cut.area == trial_of("d", 0, {}, [results(same)]).area
