"""The testbed on disk: tokenizer, template, model, cache and command."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data import ChatFormat
from patcher_pl.testbed import build, cache
from patcher_pl.testbed.world import files
from patcher_pl.types import Conversation, Message
from tests.commands import cli


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tokenizer(quick_testbed):
    return AutoTokenizer.from_pretrained(quick_testbed / "model")


def test_every_text_survives_the_tokenizer(tokenizer):
    texts = {
        text for rows in files().values() for row in rows for text in (row.prompt, row.response)
    }
    for text in sorted(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_template_marks_the_answer_and_its_end(tokenizer):
    rows = files()["safe"]
    for row in (rows[0], rows[-1]):
        conversation = Conversation(
            (Message("user", row.prompt), Message("assistant", row.response)), False, "here"
        )
        encoded = ChatFormat().encode(tokenizer, conversation)
        learned = [token for token in encoded.labels if token != -100]
        assert tokenizer.decode(learned) == row.response + tokenizer.eos_token
        prompt = ChatFormat().prompt_ids(tokenizer, [Message("user", row.prompt)])
        assert list(encoded.input_ids[: len(prompt)]) == list(prompt)
        assert list(encoded.input_ids[len(prompt) :]) == learned


def test_the_mask_of_the_template_itself_takes_in_the_end_token(tokenizer):
    """For whoever trains on the testbed with other programs: `ChatFormat` would add the token."""
    row = files()["safe"][0]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    masked = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    learned = [token for token, is_answer in masked if is_answer]
    assert tokenizer.decode(learned) == row.response + tokenizer.eos_token


def test_two_builds_agree_to_the_last_byte(quick_testbed, short_training, tmp_path):
    """Wrong if results of two machines, or of two days, could not be compared."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    build.build_testbed(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "again") == contents(quick_testbed)


def test_it_is_built_once_and_then_taken_from_the_cache(short_training, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHER_PL_CACHE", str(tmp_path))
    built = []
    real = build.build_testbed

    def build_and_count(directory):
        built.append(directory)
        real(directory)

    monkeypatch.setattr(build, "build_testbed", build_and_count)
    model = Path(cache.resolve_model("testbed"))
    data = Path(cache.resolve_data("testbed/safe.jsonl"))
    assert built == [tmp_path / f"testbed-{build.fingerprint()}"]
    assert (model / "model.safetensors").exists()
    assert data.exists()
    assert cache.resolve_model("some/model") == "some/model"
    assert cache.resolve_data("testbed.jsonl") == "testbed.jsonl"


def test_the_command_writes_it_and_spares_what_is_there(quick_testbed, short_training, tmp_path):
    out = tmp_path / "out"
    said = cli("testbed", "--out", out).expect(0)
    assert str(out) in said.out
    assert contents(out) == contents(quick_testbed)
    AutoModelForCausalLM.from_pretrained(out / "model")
    (out / "data" / "safe.jsonl").write_text("mine")
    refused = cli("testbed", "--out", out).expect(2)
    assert "--overwrite true" in refused.err
    assert (out / "data" / "safe.jsonl").read_text() == "mine"
    cli("testbed", "--out", out, "--overwrite", "true").expect(0)
    assert contents(out) == contents(quick_testbed)
