"""If these fail, weights stay behind in memory, or a run loses its mailbox to another."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from patcher_pl.private_directory import private_directory, remove_private

OWNER = """
import sys, pathlib
from patcher_pl.private_directory import private_directory
with private_directory(pathlib.Path(sys.argv[1])) as path:
    (path / "weights").write_text("heavy")
    print(path, flush=True)
    sys.stdin.read()
"""


def start_owner(parent):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return owner, owner.stdout.readline().strip()


def end(owner):
    owner.kill()
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()


def test_it_is_private_and_gone_afterwards(tmp_path):
    with private_directory(tmp_path) as path:
        (path / "inside").mkdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_gone_after_an_exception(tmp_path, error):
    with pytest.raises(error), private_directory(tmp_path) as path:
        (path / "weights").touch()
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    owner, left = start_owner(tmp_path)
    other, kept = start_owner(tmp_path)
    end(owner)
    assert Path(left).exists()
    with private_directory(tmp_path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, Path(kept)]), "its owner lives"
    end(other)


def test_only_private_directories_are_removed(tmp_path):
    """Wrong if an attacker could delete the directory that a user named."""
    (tmp_path / "mine").mkdir()
    remove_private(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    with private_directory(tmp_path) as path:
        remove_private(path)
        remove_private(path)
        assert [left.name for left in tmp_path.iterdir()] == ["mine"]
