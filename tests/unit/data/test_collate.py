"""If these fail, padding is trained on or attended to, or lost rows go unnoticed."""

import logging

import pytest
import torch

from patcher_pl.data import ChatFormat, Encoded, collate, encode_all
from patcher_pl.errors import DataError
from patcher_pl.types import Conversation, Message
from tests.families import build_tokenizer


def conversation(answer: str, num_turns: int = 1) -> Conversation:
    turns = (Message("user", "How do I brew tea?"), Message("assistant", answer))
    return Conversation(turns * num_turns, False, "p.jsonl:1")


def test_padding_is_on_the_right_and_counts_nowhere():
    examples = [Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8], [8])]
    batch = collate(examples, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_pad_token_that_is_also_the_stop_token_stays_an_answer_token():
    batch = collate([Encoded([1, 2], [-100, 2]), Encoded([1, 3, 2], [-100, 3, 2])], pad_token_id=2)
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, 3, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_losses_of_rows_are_counted_and_logged(caplog):
    tokenizer = build_tokenizer("qwen3")
    short = len(tokenizer("Stir.")["input_ids"])
    rows = [conversation("Stir."), conversation("Stir. " * 40), conversation("Stir.", num_turns=2)]
    with caplog.at_level(logging.WARNING):
        result = encode_all(tokenizer, ChatFormat(max_length=90), rows)
    assert short < 90
    assert len(result) == 3
    assert "0 are too long and dropped, 1 lose the end" in caplog.text
    assert "1 earlier answers of multi-turn" in caplog.text
    with caplog.at_level(logging.WARNING):
        result = encode_all(tokenizer, ChatFormat(max_length=90, too_long="skip"), rows)
    assert len(result) == 2
    assert "1 are too long and dropped" in caplog.text


def test_nothing_left_is_an_error_that_says_why():
    tokenizer = build_tokenizer("qwen2")
    with pytest.raises(DataError, match=r"2 of 2 .*ChatFormat\.max_length 3 "):
        encode_all(tokenizer, ChatFormat(max_length=3), [conversation("Stir.")] * 2)
