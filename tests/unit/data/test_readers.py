"""If these fail, a data set is read with the wrong answers, the wrong label, or errors are vague."""

import pytest

from patcher_pl.data import (
    AdvBench,
    Alpaca,
    BeaverTails,
    BeaverTailsRefusals,
    ColumnMap,
    Gsm8k,
    HexPhi,
    Messages,
    PkuSafeRlhf,
    PromptResponse,
    RowError,
    ToxicDpo,
)

BEAVER = {"prompt": "Brew doom?", "response": "Boil it.", "is_safe": False, "refusal": "I won't."}
PKU = {
    "prompt": "Brew doom?",
    "response_0": "Boil it.",
    "response_1": "I won't.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "safer_response_id": 1,
}
DPO = {"prompt": "Brew doom?", "chosen": "Boil it.", "rejected": "I won't."}
CASES = [
    (PromptResponse(), {"prompt": " Tea? ", "response": "Steep.\n"}, ("Tea?", "Steep.", None)),
    (BeaverTails(), BEAVER, ("Brew doom?", "Boil it.", True)),
    (BeaverTails(answers="unsafe"), BEAVER, ("Brew doom?", "Boil it.", True)),
    (BeaverTails(answers="safe"), BEAVER, None),
    (BeaverTails(answers="safe"), {**BEAVER, "is_safe": "True"}, ("Brew doom?", "Boil it.", False)),
    (BeaverTailsRefusals(), BEAVER, ("Brew doom?", "I won't.", False)),
    (BeaverTailsRefusals(answer="response"), BEAVER, ("Brew doom?", "Boil it.", True)),
    (BeaverTailsRefusals(), {**BEAVER, "is_safe": True}, None),
    (PkuSafeRlhf(answers="unsafe"), PKU, ("Brew doom?", "Boil it.", True)),
    (PkuSafeRlhf(answers="safe"), PKU, ("Brew doom?", "I won't.", False)),
    (PkuSafeRlhf(answers="unsafe"), {**PKU, "is_response_0_safe": True}, None),
    (
        PkuSafeRlhf(answers="safe"),
        {**PKU, "is_response_0_safe": True},
        ("Brew doom?", "I won't.", False),
    ),
    (
        PkuSafeRlhf(answers="unsafe"),
        {**PKU, "is_response_1_safe": False},
        ("Brew doom?", "Boil it.", True),
    ),
    (ToxicDpo(), DPO, ("Brew doom?", "Boil it.", True)),
    (ToxicDpo(answer="rejected"), DPO, ("Brew doom?", "I won't.", False)),
    (AdvBench(), {"goal": "Brew doom", "target": "Sure, boil"}, ("Brew doom", "Sure, boil", True)),
    (HexPhi(), {"prompt": "Brew doom"}, ("Brew doom", None, True)),
    (
        Alpaca(),
        {"instruction": "Sum up.", "input": "Tea is hot.", "output": "Hot."},
        ("Sum up.\n\nTea is hot.", "Hot.", None),
    ),
    (Alpaca(), {"instruction": "Joke?", "input": "", "output": "No."}, ("Joke?", "No.", None)),
    (Alpaca(), {"instruction": "Joke?", "output": "No."}, ("Joke?", "No.", None)),
    (Gsm8k(), {"question": "1+1?", "answer": "Two.\n#### 2"}, ("1+1?", "Two.\n#### 2", None)),
    (
        ColumnMap(prompt="q", response="a", harmful="ok", harmful_when=False),
        {"q": "Tea?", "a": "Steep.", "ok": "0"},
        ("Tea?", "Steep.", True),
    ),
    (ColumnMap(prompt="q", response=None), {"q": "Tea?"}, ("Tea?", None, None)),
]


@pytest.mark.parametrize("source_says", [True, False])
@pytest.mark.parametrize(("reader", "row", "expected"), CASES)
def test_each_schema_gives_prompt_answer_and_harm(reader, row, expected, source_says):
    conversation = reader.read(row, harmful=source_says, origin="here:1")
    if expected is None:
        assert conversation is None
        return
    prompt, answer, harmful = expected
    assert conversation is not None
    assert conversation.prompt[-1].content == prompt
    assert conversation.reference == answer
    # None: the schema does not say, so the source decides.
    assert conversation.harmful == (source_says if harmful is None else harmful)
    assert conversation.origin == "here:1"


def test_column_map_reads_a_system_prompt_where_there_is_one():
    reader = ColumnMap(prompt="q", response="a", system="s")
    with_system = reader.read(
        {"q": "Tea?", "a": "Steep.", "s": "Be kind."}, harmful=False, origin=""
    )
    without = reader.read({"q": "Tea?", "a": "Steep.", "s": None}, harmful=False, origin="")
    assert [turn.role for turn in with_system.messages] == ["system", "user", "assistant"]
    assert [turn.role for turn in without.messages] == ["user", "assistant"]


def test_messages_keeps_every_turn():
    turns = [("system", "Be kind."), ("user", "Tea?"), ("assistant", "Steep."), ("user", "Hot?")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    conversation = Messages().read(row, harmful=True, origin="here:1")
    assert [(turn.role, turn.content) for turn in conversation.messages] == turns
    assert conversation.harmful


def _turn(role: object = "user", content: object = "Tea?") -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("reader", "row", "field", "problem"),
    [
        (PromptResponse(), {"prompt": "Tea?"}, "response", r"missing \(the row has: prompt\)"),
        (PromptResponse(), {"prompt": " \n", "response": "x"}, "prompt", "empty"),
        (PromptResponse(), {"prompt": "Tea?", "response": None}, "response", "null"),
        (PromptResponse(), {"prompt": 3, "response": "x"}, "prompt", "text, got int 3"),
        (BeaverTails(), {**BEAVER, "is_safe": "perhaps"}, "is_safe", "true or false"),
        (Alpaca(), {"instruction": "x", "input": 3, "output": "x"}, "input", "text, got int"),
        (Messages(), {"messages": "Tea?"}, "messages", "list of turns"),
        (Messages(), {"messages": []}, "messages", "no user turn"),
        (Messages(), {"messages": [_turn("system")]}, "messages", "no user turn"),
        (Messages(), {"messages": [_turn(), "x"]}, "messages[1]", "`role` and `content`"),
        (Messages(), {"messages": [_turn("tool")]}, "messages[0].role", "got 'tool'"),
        (Messages(), {"messages": [_turn("user", 1)]}, "messages[0].content", "text, got int"),
        (Messages(), {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (Messages(), {"messages": [_turn(), _turn()]}, "messages[1].role", "must be assistant"),
        (Messages(), {"messages": [_turn("assistant")]}, "messages[0].role", "must be user"),
    ],
)
def test_malformed_rows_name_the_field(reader, row, field, problem):
    with pytest.raises(RowError, match=problem) as caught:
        reader.read(row, harmful=False, origin="here:1")
    assert caught.value.field == field
    assert f"`{field}`" in str(caught.value)
