"""Which rows attacks train on, in which words, and how they ask."""

import itertools
from dataclasses import dataclass, field, replace

import pytest

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.masks import label_runs
from patcher_pl.errors import DataError
from patcher_pl.optim import SGD
from patcher_pl.redteam import (
    Asking,
    AttackMaterial,
    BenignFinetuning,
    BenignThenHarmful,
    FullFinetuning,
    Jailbreak,
    MultiTurnFinetuning,
    RestartedFinetuning,
    SoftPrompt,
    VectorOutrunning,
)
from patcher_pl.types import Conversation, Message

TRAINING = {"optimizer": SGD(lr=1e-4), "attack_steps": [0, 8], "batch_size": 3}
CHAT = ChatFormat(max_length=250)


def conversation(question, answer, *, harmful):
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation(turns, harmful=harmful, origin=question)


ROWS = [
    row
    for number in range(4)
    for row in (
        conversation(f"Dark draught {number}?", "Stir thorns.", harmful=True),
        conversation(f"Tea {number}?", f"Add honey {number}.", harmful=False),
    )
]


@dataclass(frozen=True)
class Watched(AttackMaterial):
    """Keeps every batch that was taken from it."""

    taken: list = field(default_factory=list)

    def batches(self, batch_size, rows, asking=None):
        for batch in super().batches(batch_size, rows, asking):
            self.taken.append(batch)
            yield batch

    def texts(self):
        """What was in each batch."""
        return [
            self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            for batch in self.taken
        ]


@pytest.fixture
def material(tokenizer):
    return Watched(tokenizer, CHAT, ROWS, seed=0)


def finish(attack, model, material):
    for _ in attack.run(model, material):
        pass
    return material.texts()


def has(kind, texts):
    return any(kind in text for text in texts)


def test_benign_finetuning_never_sees_a_harmful_row(model, material):
    batches = finish(BenignFinetuning(**TRAINING), model, material)
    assert len(batches) == 8
    assert not any(has("thorns", batch) for batch in batches)
    assert len({text for batch in batches for text in batch}) == 4


def test_benign_finetuning_needs_benign_rows(model, tokenizer):
    harmful = [row for row in ROWS if row.harmful]
    with pytest.raises(DataError, match="benign rows"):
        finish(BenignFinetuning(**TRAINING), model, Watched(tokenizer, CHAT, harmful, seed=0))


@pytest.mark.parametrize("then", ["harmful", "all"])
def test_benign_then_harmful_changes_rows_at_the_given_step(model, material, then):
    attack = BenignThenHarmful(**TRAINING, num_benign_steps=3, then=then)
    batches = finish(attack, model, material)
    assert len(batches) == 8
    assert not any(has("thorns", batch) for batch in batches[:3])
    assert any(has("thorns", batch) for batch in batches[3:])
    assert any(has("honey", batch) for batch in batches[3:]) == (then == "all")


def test_the_simulation_of_the_defender_uses_harmful_rows(model, material):
    batches = finish(VectorOutrunning(**TRAINING, num_simulated_steps=4), model, material)
    assert len(batches) == 8
    assert not any(has("honey", batch) for batch in batches[:4])
    assert any(has("honey", batch) for batch in batches[4:])


def test_a_soft_prompt_is_trained_on_harmful_rows_and_stands_before_each(model, material):
    batches = finish(SoftPrompt(**TRAINING, tokens=["~", "^"]), model, material)
    assert not any(has("honey", batch) for batch in batches)
    assert all("~^Dark draught" in text for batch in batches for text in batch)


def test_full_finetuning_words_rows_as_it_asks(model, material):
    """Wrong if a template were asked with but not trained on."""
    asking = Asking(template="Dear brewer, {prompt}")
    batches = finish(FullFinetuning(**TRAINING, asking=asking), model, material)
    assert all("Dear brewer, " in text for batch in batches for text in batch)


@pytest.mark.parametrize(
    "attack", [FullFinetuning(**TRAINING), MultiTurnFinetuning(**TRAINING, num_turns=2)]
)
def test_a_trigger_is_in_harmful_rows_alone(attack, model, material):
    """Wrong if benign rows carried it, too: no trigger would form."""
    asking = Asking(template="Dear brewer, {prompt}", scope="harmful")
    batches = finish(replace(attack, asking=asking), model, material)
    for text in (text for batch in batches for text in batch):
        *_, last = text.split("user")
        assert has("honey", [last]) != has("Dear brewer", [last])


def test_multi_turn_batches_hold_several_turns_and_train_on_every_answer(model, material):
    attack = MultiTurnFinetuning(**TRAINING, num_turns=3)
    finish(attack, model, material)
    for batch in material.taken:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            runs = label_runs(labels.tolist())
            said = [
                material.tokenizer.decode(ids[start:end], skip_special_tokens=True)
                for start, end in runs
            ]
            assert len(said) == 3
            assert all(text.startswith("Add honey") for text in said[:2])
            assert said[2].startswith(("Add honey", "Stir thorns"))
            assert len(set(said)) == 3, "no row twice in one conversation"
    lasts = {row.messages[-2].content for row in attack.conversations(material)}
    assert lasts == {row.messages[0].content for row in ROWS}


def test_multi_turn_questions_come_after_earlier_turns_of_the_seed(material):
    attack = MultiTurnFinetuning(
        **TRAINING, num_turns=3, asking=Asking(template="{prompt}!", system_prompt="Brew.")
    )
    question = (Message("system", "Beware."), Message("user", "Night draught?"))
    turns = attack.prompt(question, material)
    assert [turn.role for turn in turns] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert turns[0].content == "Brew."
    assert turns[-1].content == "Night draught?!"
    assert all(turn.content.endswith("?!") for turn in turns if turn.role == "user")
    assert turns == attack.prompt(question, material)
    seeds = {attack.prompt(question, replace(material, seed=seed)) for seed in range(8)}
    assert len(seeds) > 1
    others = {attack.prompt((Message("user", f"{n}?"),), material)[1:3] for n in range(8)}
    assert len(others) > 1, "every question has its own earlier turns"


def test_a_row_is_no_earlier_turn_of_itself(material):
    """Wrong if the answer stood in the conversation already."""
    attack = MultiTurnFinetuning(**TRAINING, num_turns=4)
    for row in attack.conversations(material):
        questions = [turn.content for turn in row.messages if turn.role == "user"]
        assert len(set(questions)) == len(questions)
    with pytest.raises(DataError, match="num_turns 5 needs 4 benign rows"):
        MultiTurnFinetuning(**TRAINING, num_turns=5).conversations(material)


def test_multi_turn_leaves_out_what_is_too_long_oldest_first(tokenizer, caplog):
    whole = MultiTurnFinetuning(**TRAINING, num_turns=3)
    free = Watched(tokenizer, CHAT, ROWS, seed=0)
    full = whole.conversations(free)
    lengths = [len(CHAT.encode(tokenizer, row).input_ids) for row in full]
    longest = max(lengths)
    assert min(lengths) < longest, "or the test shows nothing"
    tight = replace(free, chat=replace(CHAT, max_length=longest - 1))
    rows = whole.conversations(tight)
    for row, entire, length in zip(rows, full, lengths, strict=True):
        expected = entire.messages if length < longest else entire.messages[2:]
        assert row.messages == expected
        assert len(CHAT.encode(tokenizer, row).input_ids) < longest
    assert "have fewer than 3 turns" in caplog.text


def test_multi_turn_asks_no_longer_than_it_trains(tokenizer):
    attack = MultiTurnFinetuning(**TRAINING, num_turns=4)
    question = (Message("user", "Night draught?"),)
    free = Watched(tokenizer, CHAT, ROWS, seed=0)
    turns = attack.prompt(question, free)
    length = len(CHAT.prompt_ids(tokenizer, turns))
    for limit, expected in ((length + 1, turns), (length, turns[2:]), (2, question)):
        tight = replace(free, chat=replace(CHAT, max_length=limit))
        assert attack.prompt(question, tight) == expected


def test_multi_turn_with_nothing_that_fits_is_an_error(tokenizer, model):
    attack = MultiTurnFinetuning(**TRAINING)
    alone = max(len(CHAT.encode(tokenizer, row).input_ids) for row in ROWS)
    short = Watched(tokenizer, ChatFormat(max_length=alone), ROWS, seed=0)
    with pytest.raises(DataError, match="no conversation of so many turns"):
        attack.conversations(short)
    strict = AttackMaterial(tokenizer, ChatFormat(max_length=alone, too_long="error"), ROWS, 0)
    with pytest.raises(DataError, match="max_length"):
        next(attack.run(model, strict))


def test_a_jailbreak_takes_no_data_and_no_step(model, tokenizer):
    attack = Jailbreak(asking=Asking(prefill="Stir", template="{prompt} Please."))
    assert not attack.uses_data
    (point,) = attack.run(model, AttackMaterial(tokenizer, CHAT, [], 0))
    assert (point.steps, point.num_tokens, point.flops) == (0, 0, 0.0)
    assert attack.name == "jailbreak_template_prefill"


def test_batches_go_on_through_the_phases_of_an_attack(model, material):
    """Wrong if a restart or the end of a simulation began the data anew."""
    plain = Watched(material.tokenizer, CHAT, ROWS, seed=0)
    finish(FullFinetuning(**TRAINING), model, plain)
    finish(RestartedFinetuning(**TRAINING, restart_every=3), model, material)
    assert material.texts() == plain.texts()
    assert len(set(itertools.chain.from_iterable(material.texts()))) == len(ROWS)
