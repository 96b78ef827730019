"""If these fail, defender steps are taken against other vectors than was asked for."""

from collections import Counter

import pytest

from patcher_pl.attackers import combined


def chosen(combine, num_steps=300, seed=0, items="abc"):
    return ["".join(combined(items, combine, step=s, seed=seed)) for s in range(num_steps)]


def test_all_one_after_the_other_or_drawn():
    assert set(chosen("average")) == {"abc"}
    assert chosen("in_turn", 4) == ["a", "b", "c", "a"]
    drawn = Counter(chosen("at_random"))
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 70, "evenly"


def test_draws_depend_on_seed_and_step_alone():
    """Wrong if a resumed run drew others, or every run the same."""
    assert chosen("at_random") == chosen("at_random")
    assert chosen("at_random") != chosen("at_random", seed=1)


@pytest.mark.parametrize("combine", ["average", "in_turn", "at_random"])
def test_without_vectors_there_is_nothing_to_choose(combine):
    assert list(combined([], combine, step=3, seed=0)) == []
