"""Checkpoints are whole or not there, and a disk that fills up costs nothing that was saved."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from patcher_pl.callbacks import AtomicCheckpointIO, RunCheckpoint
from patcher_pl.callbacks.checkpoint_files import MANIFEST, remove
from patcher_pl.callbacks.run_checkpoint import find_last, point_last_at
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


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(inputs, tmp_path, monkeypatch, in_background):
    """Wrong if `--ckpt_path last` then led to half a file, or nobody heard of it."""
    settings = sft_settings(inputs) | {"checkpoint_in_background": in_background}
    config = write_yaml(tmp_path / "config.yaml", settings)
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
    assert said.err.count("could not be written") == 1
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
        torch.save({}, tmp_path / f"step-{step:08d}.ckpt")
    assert find_last(tmp_path).name == "step-00000010.ckpt"


def write_checkpoints(folder):
    """A file, and two folders as several processes write them; the newest is pointed at."""
    torch.save({}, folder / "step-00000001.ckpt")
    for step in (2, 3):
        path = folder / f"step-{step:08d}.ckpt"
        path.mkdir()
        (path / "part").write_text("abc")
        (path / MANIFEST).write_text(json.dumps({"part": 3}))
    point_last_at(path)


def cut(path):
    os.truncate(path / "part", 2)


def lose_a_part(path):
    (path / "part").unlink()


def lose_the_manifest(path):
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("tear", [cut, lose_a_part, lose_the_manifest])
def test_the_one_before_is_used_where_the_newest_is_torn(tmp_path, tear, caplog):
    write_checkpoints(tmp_path)
    assert find_last(tmp_path).name == "step-00000003.ckpt"
    tear(tmp_path / "step-00000003.ckpt")
    assert find_last(tmp_path).name == "step-00000002.ckpt"
    assert "step-00000003.ckpt is torn" in caplog.text
    tear(tmp_path / "step-00000002.ckpt")
    assert find_last(tmp_path).name == "step-00000001.ckpt"
    os.truncate(tmp_path / "step-00000001.ckpt", 100)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_last(tmp_path)
    with pytest.raises(CheckpointError, match="missing or were cut off"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step-00000002.ckpt")


def test_the_pointer_moves_from_folder_to_folder(tmp_path):
    """Wrong if replacing the link removed the folder that it pointed at."""
    write_checkpoints(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for step in (2, 3, 2):
        point_last_at(tmp_path / f"step-{step:08d}.ckpt")
        assert (tmp_path / "last.ckpt").resolve().name == f"step-{step:08d}.ckpt"
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_link_that_a_killed_run_left_is_swept_up(tmp_path):
    """Wrong if it stayed because it leads to a folder."""
    write_checkpoints(tmp_path)
    leftover = tmp_path / ".last.ckpt.0123.tmp"
    leftover.symlink_to("step-00000003.ckpt")
    remove(leftover)
    assert not leftover.is_symlink()
    assert (tmp_path / "step-00000003.ckpt" / "part").exists()


def test_a_torn_checkpoint_costs_a_run_nothing_but_the_steps_since(inputs, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    command = ("fit", "--config", config, "--run_dir")
    cli(*command, tmp_path / "whole").expect(0)
    cli(*command, tmp_path / "torn").expect(0)
    checkpoints = tmp_path / "torn" / "checkpoints"
    newest = checkpoints / "step-00000008.ckpt"
    os.truncate(newest, newest.stat().st_size // 2)
    named = cli(*command, tmp_path / "torn", "--ckpt_path", newest)
    assert named.status == 2 and "is torn" in named.err
    said = cli(*command, tmp_path / "torn", "--ckpt_path", "last").expect(0)
    said_in_one_line = "".join(said.out.split())  # The terminal breaks it anywhere.
    assert "step-00000008.ckptistorn" in said_in_one_line
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "torn" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_auto_begins_or_goes_on(inputs, tmp_path):
    """What a job that is put back into the queue runs every time."""
    settings = sft_settings(inputs)
    stop = {"class_path": "tests.commands.StopAt", "init_args": {"step": 4, "defense": "SFT"}}
    settings["trainer"]["callbacks"] = [stop]
    stopping = write_yaml(tmp_path / "stopping.yaml", settings)
    plain = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    command = ("--run_dir", tmp_path / "run", "--ckpt_path", "auto")
    cli("fit", "--config", stopping, *command).expect(143)
    cli("fit", "--config", plain, *command).expect(0)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("field", ["every_n_steps", "num_kept"])
def test_values_out_of_range_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=rf"RunCheckpoint\.{field} must be >= 1, got 0"):
        RunCheckpoint(tmp_path, **{field: 0})
