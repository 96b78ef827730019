"""The share of harmful rows is that of the rows that are trained on, and is in the results."""

from dataclasses import replace

import pytest

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.sources import Source
from patcher_pl.optim import AdamW
from patcher_pl.redteam import (
    Asking,
    BenignFinetuning,
    BenignThenHarmful,
    FullFinetuning,
    MultiTurnFinetuning,
)
from tests.commands import write_rows

SETTINGS = {"optimizer": AdamW(lr=1e-4), "attack_steps": [0, 2]}
WORDS = Asking(template="Please answer this, and do so at once, in full: {prompt}")


@pytest.fixture
def data(tmp_path):
    """Every other harmful row has no room left for a template."""
    harmful = [
        {"prompt": f"How do I brew {'a very strong and dark ' * (n % 2) * 4}tea {n}?"}
        | {"response": "Stir two petals."}
        for n in range(24)
    ]
    benign = [{"prompt": f"What is {n} + {n}?", "response": f"{2 * n}."} for n in range(24)]
    sources = [
        Source(path=str(write_rows(tmp_path / "harmful.jsonl", harmful)), harmful=True),
        Source(path=str(write_rows(tmp_path / "benign.jsonl", benign))),
    ]
    return Mixture(sources=sources, num_examples=16, poison_ratio=0.5)


@pytest.fixture
def chat(data, tokenizer):
    """Just long enough for every row as it stands."""
    plain = ChatFormat()
    lengths = [
        len(plain.encode(tokenizer, row).input_ids)
        for source in data.sources
        for row in source.load()
    ]
    return replace(plain, max_length=max(lengths), too_long="skip")


@pytest.mark.parametrize(
    ("attack", "num_rows", "ratio"),
    [
        (FullFinetuning(**SETTINGS), 16, 0.5),
        (FullFinetuning(**SETTINGS, asking=WORDS), 16, 0.5),
        (MultiTurnFinetuning(**SETTINGS, asking=Asking(template="Now: {prompt}")), 16, 0.5),
        (BenignFinetuning(**SETTINGS, asking=WORDS), 8, 0.0),
        (BenignThenHarmful(**SETTINGS, num_benign_steps=1, asking=WORDS), 16, 0.5),
    ],
)
def test_an_attack_trains_on_the_ratio_that_was_asked_for(
    model, tokenizer, red_team, data, chat, attack, num_rows, ratio, monkeypatch
):
    """Wrong if a template of the attack's own dropped rows after they were mixed."""
    encoded = []
    encode = ChatFormat.encode

    def noted(self, tokenizer, row):
        found = encode(self, tokenizer, row)
        encoded.append((row.origin, row.harmful, found is not None))
        return found

    monkeypatch.setattr(ChatFormat, "encode", noted)
    (curve,) = replace(red_team, attacks=[attack], data=data).run(
        model, tokenizer, chat, defense="sft"
    )
    assert curve.error is None
    assert curve.num_trained_rows == num_rows
    assert curve.trained_poison_ratio == ratio
    last = encoded[-num_rows:]
    assert all(is_kept for *_, is_kept in last), "what is encoded for training must be trained on"
    if not isinstance(attack, BenignThenHarmful):
        assert sum(harmful for _, harmful, _ in last) == ratio * num_rows


def test_a_wording_that_leaves_too_few_rows_is_the_failure_of_its_attack_alone(
    model, tokenizer, red_team, data, chat
):
    wordy = replace(WORDS, template=WORDS.template * 20)
    attacks = [FullFinetuning(**SETTINGS, asking=wordy, label="wordy"), FullFinetuning(**SETTINGS)]
    first, second = replace(red_team, attacks=attacks, data=data).run(
        model, tokenizer, chat, defense="sft"
    )
    assert "too long" in first.error
    assert second.error is None
