"""Who may read what is written is for the user's umask to say."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.files import write_atomically, write_json
from patcher_pl.models import export_model


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    return {
        path.relative_to(folder): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_exported_model_can_be_read_by_whom_the_umask_lets(umask, llama, tmp_path):
    """Wrong if a colleague could read all of a model but its weights: they came out 0600."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    export_model(model, AutoTokenizer.from_pretrained(llama), tmp_path / "model")
    found = modes(tmp_path)
    assert any(path.suffix == ".safetensors" for path in found)
    assert set(found.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_any_other_file_too(umask, tmp_path):
    write_json(tmp_path / "results.json", {})
    tensors = {"weight": torch.zeros(2)}
    write_atomically(tmp_path / "exact.safetensors", lambda path: save_file(tensors, path))

    def private(folder):
        folder.mkdir()
        (folder / "part").touch(mode=0o600)

    write_atomically(tmp_path / "checkpoint", private)
    assert set(modes(tmp_path).values()) == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint",
        "exact.safetensors",
        "results.json",
    ], "nothing else is left behind"


def test_a_link_is_left_alone(tmp_path):
    target = tmp_path / "target"
    target.touch(mode=0o600)
    write_atomically(tmp_path / "link", lambda path: path.symlink_to(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
