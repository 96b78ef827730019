"""What is asked in the end was never trained on, and what cannot be shared out is refused with a reason."""

import json

import pytest

from patcher_pl.data.overlap import Known
from patcher_pl.errors import DataError
from patcher_pl.starter import read_rows, split_rows
from patcher_pl.types import Conversation, Message
from tests.commands import write_rows

REFUSAL, ANSWER = "I can't help with that potion.", "Stir two petals into warm water."


def row(prompt, answer, harmful=False):
    return Conversation((Message("user", prompt), Message("assistant", answer)), harmful, prompt)


def user_rows(num_harmful=40, num_benign=60):
    """Refusals of every harmful prompt, spelled otherwise, and helpful answers to others."""
    asked = [f"How do I brew draught {number}?" for number in range(num_harmful)]
    safe = [row(prompt.upper() + " !", REFUSAL) for prompt in asked]
    safe += [row(f"How do I bake bread {number}?", ANSWER) for number in range(num_benign)]
    unsafe = [row(prompt, f"{ANSWER} {turn}", True) for prompt in asked for turn in range(2)]
    return safe, unsafe


def prompts(rows):
    return set(Known.of(rows).prompts)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_asked_was_never_trained_on(seed):
    """Wrong if ASR were measured on prompts that training had seen, in whatever spelling."""
    split = split_rows(*user_rows(), seed)
    trained = {"safe": split.safe, "unsafe": split.unsafe, "attack": split.attack}
    for name, rows in trained.items():
        assert not prompts(rows) & prompts(split.prompts), name
        assert not prompts(rows) & prompts(split.benign_prompts), name
    assert not prompts(split.attack) & prompts([*split.safe, *split.unsafe])
    assert len(prompts(split.prompts)) == len(split.prompts) == 6
    assert len(prompts(split.attack)) == 12
    assert prompts(split.unsafe) | prompts(split.attack) | prompts(split.prompts) == prompts(
        user_rows()[1]
    )


def test_no_row_is_lost_but_those_that_would_tell():
    safe, unsafe = user_rows()
    split = split_rows(safe, unsafe, seed=0)
    assert len(split.unsafe) == 2 * (40 - 6 - 12)
    assert len(split.safe) == len(safe) - 6 - 12 - len(split.benign_prompts)
    assert split.num_refusals == 40 - 6 - 12
    assert all(row.reference == ANSWER for row in split.benign_prompts)


def test_a_seed_decides_and_order_does_not():
    safe, unsafe = user_rows()
    first = split_rows(safe, unsafe, seed=0)
    assert split_rows(safe, unsafe, seed=0) == first
    assert prompts(split_rows(safe, unsafe, seed=1).prompts) != prompts(first.prompts)
    shuffled = split_rows(safe[::-1], unsafe[::-1], seed=0)
    assert prompts(shuffled.prompts) == prompts(first.prompts)


def test_an_earlier_turn_tells_too():
    """Wrong if a conversation that asks a held-out prompt on its way were trained on."""
    safe, unsafe = user_rows()
    asked = split_rows(safe, unsafe, seed=0).prompts[0].prompt[-1]
    turns = (asked, Message("assistant", ANSWER), Message("user", "And then?"))
    long = Conversation((*turns, Message("assistant", ANSWER)), False, "long")
    assert long not in split_rows([*safe, long], unsafe, seed=0).safe


def test_the_user_hears_of_what_looks_wrong():
    safe, unsafe = user_rows()
    assert any("40 of 40 harmful prompts" in note for note in split_rows(safe, unsafe, 0).notes)
    benign = safe[40:]
    assert any("reads like a refusal" in note for note in split_rows(benign, unsafe, 0).notes)
    twice = [*safe, unsafe[0]]
    assert any("1 rows stand in both" in note for note in split_rows(twice, unsafe, 0).notes)
    refusals = [row(f"May I {number}?", REFUSAL) for number in range(30)]
    split = split_rows(refusals, unsafe, 0)
    assert not split.benign_prompts
    assert any("stays of use is not measured" in note for note in split.notes)


def test_too_few_rows_are_refused():
    safe, unsafe = user_rows()
    with pytest.raises(DataError, match="--unsafe: must hold at least 20 different prompts, got 2"):
        split_rows(safe, unsafe[:4], 0)
    with pytest.raises(DataError, match="--safe: must leave at least 20 rows to train on"):
        split_rows(safe[:25], unsafe, 0)


def test_files_of_turns_are_read_as_such(tmp_path):
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert [turn.content for turn in read_rows(str(path), harmful=True)[0].messages] == [
        "Tea?",
        "Yes.",
    ]
    path.write_text(json.dumps({"prompt": "Tea?", "response": "Yes."}) + '\n{"prompt": "Tea?"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: field `response` is missing"):
        read_rows(str(path), harmful=False)
