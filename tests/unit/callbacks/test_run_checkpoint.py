"""Checkpoints are whole or not there, and a disk that fills up costs nothing that was saved."""

import errno
import os
from pathlib import Path

import pytest
import torch

from patcher_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint, find_last
from patcher_pl.errors import CheckpointError
from tests.commands import cli, sft_settings, write_inputs, write_yaml

REAL_SAVE = torch.save


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class FullDisk:
    """Stands for `torch.save` on a disk that fills up in the middle of a checkpoint."""

    def __init__(self, good_saves):
        self.good_saves = good_saves

    def __call__(self, content, path, *args, **kwargs):
        REAL_SAVE(content, path, *args, **kwargs)
        self.good_saves -= 1
        if self.good_saves < 0:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before(inputs, tmp_path, monkeypatch):
    """Wrong if `--ckpt_path last` then led to half a file."""
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    command = ("fit", "--config", config, "--run_dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", FullDisk(good_saves=1))
        said = cli(*command)
    assert said.status in (1, 2)
    message = said.err.splitlines()[-1]
    assert "step-00000006.ckpt" in message
    assert "No space left" in message
    assert "--ckpt_path last" in message
    assert "Traceback" not in said.err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "last.ckpt",
        "step-00000003.ckpt",
    ]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
    cli(*command, "--ckpt_path", "last").expect(0)
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 8
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", FullDisk(good_saves=0))
        with pytest.raises(CheckpointError, match="No space left on device"):
            AtomicCheckpointIO().save_checkpoint({"value": 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_is_found_where_the_link_was_lost(tmp_path):
    for step in (2, 10):
        (tmp_path / f"step-{step:08d}.ckpt").touch()
    assert find_last(tmp_path).name == "step-00000010.ckpt"


@pytest.mark.parametrize("field", ["every_n_steps", "num_kept"])
def test_values_out_of_range_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=rf"RunCheckpoint\.{field} must be >= 1, got 0"):
        RunCheckpoint(tmp_path, **{field: 0})
