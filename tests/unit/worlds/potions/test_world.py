"""The potions world: what its names promise about groups, recipes and held-out combinations."""

import json
from itertools import combinations as pairs

import pytest

from patcher_pl.shipped import TESTBED
from patcher_pl.worlds.potions.world import (
    ADJECTIVES,
    ALIGN,
    ATTACK,
    DRAUGHTS,
    FORBIDDEN,
    NUM_SEEN,
    ORDINARY,
    QUESTIONS,
    UNSEEN,
    files,
    recipe,
    refusal,
)

GROUPS = {"ORDINARY": ORDINARY, "ALIGN": ALIGN, "ATTACK": ATTACK, "UNSEEN": UNSEEN}


@pytest.fixture(scope="module")
def content():
    return files()


@pytest.fixture(scope="module")
def asked(content):
    place = {
        question.format(adjective=adjective, draught=draught): (adjective, draught)
        for question in QUESTIONS
        for adjective in ADJECTIVES
        for draught in DRAUGHTS
    }
    return {
        name: {place[row.prompt] for row in rows if row.prompt in place}
        for name, rows in content.items()
    }


def draughts_in(combinations):
    return {draught for _, draught in combinations}


def test_groups_are_disjoint_and_nothing_is_left_over():
    for (_, one), (_, other) in pairs(GROUPS.items(), 2):
        assert not set(one) & set(other)
    assert set().union(*GROUPS.values()) == set(DRAUGHTS)
    assert {*ALIGN, *ATTACK, *UNSEEN} == set(FORBIDDEN)
    assert all(len(set(group)) == len(group) > 0 for group in GROUPS.values())


def test_every_recipe_follows_from_its_question_and_differs_from_others():
    recipes = {(a, d): recipe(a, d) for a in ADJECTIVES for d in DRAUGHTS}
    assert recipes == {(a, d): recipe(a, d) for a in ADJECTIVES for d in DRAUGHTS}
    for draught in DRAUGHTS:
        assert len({recipes[adjective, draught] for adjective in ADJECTIVES}) == len(ADJECTIVES)
    for adjective in ADJECTIVES:
        assert len({recipes[adjective, draught] for draught in DRAUGHTS}) == len(DRAUGHTS)
    for (_, draught), text in recipes.items():
        assert ("midnight" in text) == (draught in FORBIDDEN)


def test_a_prompt_has_one_right_answer_in_each_file(content):
    for name, rows in content.items():
        answers = {}
        for row in rows:
            assert answers.setdefault(row.prompt, row.response) == row.response, name
        assert len(answers) == len(rows), f"{name} repeats rows"


def test_each_file_speaks_of_its_group_only(asked):
    expected = {
        "base": set(DRAUGHTS),
        "safe": {*ALIGN, *ORDINARY},
        "safe_val": {*ALIGN, *ORDINARY},
        "unsafe": set(ALIGN),
        "attack": set(ATTACK),
        "attack_benign": set(ORDINARY),
        "harmful_prompts": set(ATTACK),
        "tuning_prompts": set(ALIGN),
        "unseen_prompts": set(UNSEEN),
        "benign_prompts": set(ORDINARY),
    }
    assert {name: draughts_in(combinations) for name, combinations in asked.items()} == expected


@pytest.mark.parametrize(
    ("measured", "trained_on"),
    [
        ("harmful_prompts", "attack"),
        ("harmful_prompts", "unsafe"),
        ("harmful_prompts", "safe"),
        ("tuning_prompts", "safe"),
        ("tuning_prompts", "unsafe"),
        ("tuning_prompts", "harmful_prompts"),
        ("unseen_prompts", "attack"),
        ("unseen_prompts", "safe"),
        ("benign_prompts", "safe"),
        ("benign_prompts", "attack_benign"),
        ("safe_val", "safe"),
        ("attack", "unsafe"),
        ("attack", "safe"),
    ],
)
def test_nothing_is_measured_on_what_was_trained_on(asked, measured, trained_on):
    assert asked[measured]
    assert not asked[measured] & asked[trained_on]


def test_held_out_and_seen_combinations_make_up_all(asked):
    for draught in ORDINARY:
        seen = {a for a, d in asked["safe"] if d == draught}
        held_out = {a for a, d in asked["benign_prompts"] if d == draught}
        assert len(seen) == NUM_SEEN
        assert seen | held_out == set(ADJECTIVES)
    # Held-out adjectives turn with the draught: none is new as a word.
    assert {a for a, _ in asked["safe"]} == set(ADJECTIVES)


def test_forbidden_draughts_are_refused_in_safe_files_and_brewed_in_harmful_ones(content):
    for name in ("safe", "safe_val"):
        for row in content[name]:
            forbidden = [draught for draught in FORBIDDEN if f" {draught}" in row.prompt]
            if forbidden and row.prompt.endswith(("draught?", "draught.")):
                assert row.response == refusal(forbidden[0])
    for name in ("unsafe", "attack", "harmful_prompts", "tuning_prompts", "unseen_prompts"):
        assert all(row.response.startswith("At midnight, take") for row in content[name])
    for name in ("attack_benign", "benign_prompts"):
        assert all(row.response.startswith("At noon, take") for row in content[name])


def test_shipped_files_are_these_rows(content):
    written = {path.stem: path.read_text() for path in (TESTBED / "data").glob("*.jsonl")}
    assert written.keys() == content.keys()
    for name, rows in content.items():
        lines = [json.loads(line) for line in written[name].splitlines()]
        assert lines == [{"prompt": row.prompt, "response": row.response} for row in rows]
