"""The testbed that ships: data, tokenizer, template, model and command."""

import os
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data import ChatFormat
from patcher_pl.shipped import TESTBED, resolve_data, resolve_model
from patcher_pl.types import Conversation, Message
from patcher_pl.worlds.potions.world import files
from tests.commands import ROOT, cli


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TESTBED / "model")


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


def test_its_names_stand_for_files_that_are_there():
    assert (Path(resolve_model("testbed")) / "model.safetensors").is_file()
    assert {Path(resolve_data(f"testbed/{name}.jsonl")).is_file() for name in files()} == {True}
    assert resolve_model("some/model") == "some/model"
    assert resolve_data("testbed.jsonl") == "testbed.jsonl"


def test_every_file_ships_with_the_package():
    """Wrong if what works in a clone of the repository were missing from a wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["patcher_pl"]
    package = ROOT / "patcher_pl"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    there = {
        path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in there if path.suffix != ".py"} == shipped


def test_the_command_writes_it_and_spares_what_is_there(tmp_path):
    out = tmp_path / "out"
    said = cli("testbed", "--out", out).expect(0)
    assert str(out) in said.out
    assert contents(out) == contents(TESTBED)
    AutoModelForCausalLM.from_pretrained(out / "model")
    (out / "data" / "safe.jsonl").write_text("mine")
    refused = cli("testbed", "--out", out).expect(2)
    assert "--overwrite true" in refused.err
    assert (out / "data" / "safe.jsonl").read_text() == "mine"
    cli("testbed", "--out", out, "--overwrite", "true").expect(0)
    assert contents(out) == contents(TESTBED)


@pytest.mark.parametrize(("umask", "modes"), [(0o027, {0o640, 0o750}), (0o002, {0o664, 0o775})])
def test_who_may_read_it_is_for_the_user_to_say(umask, modes, tmp_path):
    before = os.umask(umask)
    try:
        cli("testbed", "--out", tmp_path / "out").expect(0)
    finally:
        os.umask(before)
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in written} == modes
