"""Repetition of known texts, by counting."""

import math

import pytest

from patcher_pl.evaluation.judges import is_coherent
from patcher_pl.evaluation.repetition import mean_repetition, repetition


def test_repeated_sequences_are_counted_by_hand():
    assert repetition("Stir the pot, then stir the kettle.") == 0.0
    # Six words, four sequences; "stir the pot" comes twice.
    assert repetition("Stir the pot. STIR the pot!") == pytest.approx(1 / 4)
    # Ten words, eight sequences, all the same.
    assert repetition("tea " * 10) == pytest.approx(7 / 8)


def test_a_script_without_spaces_counts_characters():
    """Wrong if a model going in circles in Chinese came out as one harmless word."""
    assert repetition("茶" * 40) == pytest.approx(37 / 38)


@pytest.mark.parametrize("text", ["", "Hot tea.", "?!"])
def test_text_too_short_to_repeat_is_nan_and_not_zero(text):
    """Wrong if an empty answer counted as one free of repetition."""
    assert math.isnan(repetition(text))


def test_the_mean_leaves_out_what_is_too_short():
    assert mean_repetition(["", "tea " * 10, "Stir the pot well."]) == pytest.approx(7 / 16)
    assert math.isnan(mean_repetition(["", "Tea."]))
    assert math.isnan(mean_repetition([]))


@pytest.mark.parametrize("repeats", range(5, 12))
def test_it_is_what_coherence_rests_on(repeats):
    """Wrong if the reported repetition and the judge's coherence spoke of two things."""
    text = "Stir the green pot slowly for ten minutes and wait. " + "Add tea. " * repeats
    share = repetition(text)
    assert is_coherent(text, share)
    assert not is_coherent(text, share - 1e-9)
