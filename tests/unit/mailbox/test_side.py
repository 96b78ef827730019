"""If these fail, a reader of the mailbox may get half a snapshot, an old one, or none."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from patcher_pl.mailbox import Side, Snapshot, snapshot
from patcher_pl.mailbox import side as side_module

NAMES = ("a.weight", "b.bias")


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((3, 4), float(value)) for name in NAMES}


@pytest.fixture
def side(tmp_path) -> Side:
    return Side(tmp_path / "side")


def test_tensors_come_back_by_name_and_in_place(side):
    written = {"b": torch.randn(2, 3), "a": torch.randn(5).to(torch.bfloat16)}
    assert side.publish(4, written, {"loss": 0.1, "steps": [1, 2]})
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    read = {"a": torch.zeros(5, dtype=torch.bfloat16), "b": parameter.detach()}
    found = side.fetch(read)
    assert (found.version, found.info) == (4, {"loss": 0.1, "steps": [1, 2]})
    assert torch.equal(parameter, written["b"])
    assert torch.equal(read["a"], written["a"])


@pytest.mark.parametrize(
    "wanted", [{"c": torch.zeros(3, 4)}, {"a.weight": torch.zeros(9)}], ids=["name", "shape"]
)
def test_another_model_is_an_error_and_not_a_wait_for_ever(side, wanted):
    side.publish(0, filled(0), {})
    with pytest.raises((RuntimeError, ValueError)):
        side.fetch(wanted)


def test_nothing_is_there_before_the_first(side):
    assert side.newest() is None
    assert side.fetch(filled(0)) is None
    side.clear()
    side.clean()


def test_the_newest_two_are_kept(side):
    for version in (1, 2, 10):
        side.publish(version, filled(version), {})
        assert side.newest().version == version
    assert side.versions() == [2, 10]
    assert sorted(path.name for path in side.directory.iterdir()) == ["00000002", "00000010"]


def test_the_first_of_two_writers_wins(side):
    assert side.publish(3, filled(1), {})
    assert not side.publish(3, filled(2), {})
    read = filled(0)
    side.fetch(read)
    assert torch.equal(read["a.weight"], filled(1)["a.weight"])
    assert len(list(side.directory.iterdir())) == 1


def test_a_full_disk_leaves_the_snapshot_before_and_nothing_else(side, monkeypatch):
    side.publish(0, filled(0), {})

    def write_half(folder, *_):
        snapshot.write_snapshot(folder, filled(1), {})
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(side_module, "write_snapshot", write_half)
    with pytest.raises(OSError, match="No space left"):
        side.publish(1, filled(1), {})
    assert [path.name for path in side.directory.iterdir()] == ["00000000"]


def test_what_is_not_wanted_is_not_read(side):
    side.publish(0, filled(7), {"life": "other"})
    read = filled(0)
    assert side.fetch(read, lambda found: found.info["life"] == "mine") is None
    assert torch.equal(read["b.bias"], filled(0)["b.bias"])


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_reader_whose_snapshot_vanishes_takes_the_next(side, monkeypatch, moment):
    """Wrong if a slow reader died of the writer's tidiness."""
    side.publish(0, filled(0), {})
    late = iter([1, 2, 3])

    def overtake():
        for version in late:
            side.publish(version, filled(version), {})

    if moment == "within":
        real = snapshot.load

        def load_after_metadata(state, storage_reader, **options):
            storage_reader.read_metadata()
            overtake()
            return real(state, storage_reader=storage_reader, **options)

        monkeypatch.setattr(snapshot, "load", load_after_metadata)
    else:
        real_open = Snapshot.open

        def open_late(path):
            overtake()
            return real_open(path)

        monkeypatch.setattr(Snapshot, "open", open_late)
    read = filled(-1)
    assert side.fetch(read).version == 3
    assert torch.equal(read["a.weight"], filled(3)["a.weight"])


def test_many_writers_and_readers_never_see_a_mixture(side):
    """Every tensor of a snapshot holds its version; any other value is torn."""
    versions = iter(range(40))
    lock, done, problems = threading.Lock(), threading.Event(), []

    def write():
        while True:
            with lock:
                version = next(versions, None)
            if version is None:
                return
            side.publish(version, filled(version), {"version": version})

    def read():
        last = -1
        while not done.is_set():
            tensors = filled(-1)
            found = side.fetch(tensors)
            if found is None:
                continue
            values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
            if values != {float(found.version)} or found.info["version"] != found.version:
                problems.append((found.version, values))
            if found.version < last:
                problems.append((found.version, "after", last))
            last = found.version

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write) for _ in range(3)]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        for reader in readers:
            reader.result()
    assert not problems
    assert side.newest().version == 39
    assert not list(side.directory.glob(".*"))


def ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def half_written(side: Side, process: int, host: str | None = None) -> Path:
    """What a writer leaves that was killed in the middle."""
    host = side_module._writer().split(".")[0] if host is None else host
    folder = side.directory / f".00000007.{host}.{process}.0123abcd"
    snapshot.write_snapshot(folder, filled(7), {})
    (folder / "__0_0.distcp").write_bytes(b"torn")
    return folder


def test_a_half_written_snapshot_is_never_seen_and_cleaned_up(side):
    side.publish(0, filled(0), {})
    mine = half_written(side, os.getpid())
    dead = half_written(side, ended_process())
    elsewhere = half_written(side, 1, host="another")
    assert side.newest().version == 0
    side.clean()
    assert mine.exists(), "its writer lives"
    assert not dead.exists()
    assert elsewhere.exists(), "its writer may live"
    os.utime(elsewhere, (0, 0))
    side.clean()
    assert not elsewhere.exists()
    assert side.versions() == [0]


WRITER = """
import itertools, sys, torch
from patcher_pl.mailbox import Side
side = Side(__import__("pathlib").Path(sys.argv[1]))
tensors = {name: torch.zeros(300, 400) for name in ("a", "b")}
for version in itertools.count():
    for tensor in tensors.values():
        tensor.fill_(version)
    side.publish(version, tensors, {})
"""


def test_a_killed_writer_leaves_whole_snapshots_only(side):
    """SIGKILL at whatever it was doing, while this process reads."""
    side.directory.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(side.directory)]
    writer = subprocess.Popen(command)
    seen, tensors = set(), {"a": torch.zeros(300, 400), "b": torch.zeros(300, 400)}
    try:
        while len(seen) < 8:
            assert writer.poll() is None
            if (found := side.fetch(tensors)) is not None:
                assert {float(each.min()) for each in tensors.values()} == {found.version}
                assert {float(each.max()) for each in tensors.values()} == {found.version}
                seen.add(found.version)
    finally:
        writer.kill()
        writer.wait()
    found = side.fetch(tensors)
    assert {float(each.max()) for each in tensors.values()} == {found.version}
    side.clean()
    assert len(list(side.directory.iterdir())) <= 2


def write_sharded(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    whole = torch.arange(12.0).reshape(6, 2)
    side = Side(Path(folder) / "side")
    assert side.publish(1, {"w": distribute_tensor(whole, mesh, [Shard(0)])}, {"world": 2})
    read = {"w": distribute_tensor(torch.zeros(6, 2), mesh, [Shard(1)])}
    assert side.fetch(read).info == {"world": 2}
    assert torch.equal(read["w"].full_tensor(), whole)
    dist.barrier()  # Whoever leaves while the other still reads takes it along.
    dist.destroy_process_group()


@pytest.mark.slow
def test_worlds_of_different_sizes_exchange_sharded_tensors(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_sharded, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    read = {"w": torch.zeros(6, 2)}
    assert Side(tmp_path / "side").fetch(read).version == 1
    assert torch.equal(read["w"], torch.arange(12.0).reshape(6, 2))
