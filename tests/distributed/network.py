"""Two network namespaces that only a cable joins: as far as a network goes, two machines."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.commands import ROOT

TIMEOUT_S = 600
# For documentation, RFC 5737: nobody has them.
ADDRESSES = ("192.0.2.1", "192.0.2.2")


@dataclass(frozen=True)
class Machine:
    """One of them.

    Args:
        name: Of the namespace.
        rank: Its number.
        cable: Its network interface.
    """

    name: str
    rank: int
    cable: str

    @property
    def address(self) -> str:
        return ADDRESSES[self.rank]

    def torchrun(self, *arguments: object, log: Path, max_restarts: int = 0) -> subprocess.Popen:
        """Starts the program with one process here, and waits for the other machine."""
        command = [
            *("ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc-per-node=1", f"--max-restarts={max_restarts}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=tests"),
            # Or torchrun asks what the host's name stands for, which both have.
            f"--rdzv-conf=is_host={str(self.rank == 0).lower()}",
            *(f"--local-addr={self.address}", "-m", "patcher_pl", *map(str, arguments)),
        ]
        # So does gloo.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable}
        # Or torchrun tells the address of its store in the first round alone, and a machine that
        # comes in a later one waits for it in vain (torch 2.13).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def lose(self) -> None:
        """Kills all that runs here, at once."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        for process in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


def connect() -> tuple[Machine, Machine]:
    """Makes two machines.

    Raises:
        OSError: If this machine does not allow that, with what it said.
    """
    if shutil.which("ip") is None:
        raise OSError("there is no program `ip`")
    own = f"ppl{os.getpid() % 100000}"
    first, second = (Machine(f"{own}-{end}", rank, f"{own}{end}") for rank, end in enumerate("ab"))
    try:
        for machine in (first, second):
            _ip("netns", "add", machine.name)
        _ip("link", "add", first.cable, "type", "veth", "peer", "name", second.cable)
        for machine in (first, second):
            _ip("link", "set", machine.cable, "netns", machine.name)
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.cable)
            for interface in ("lo", machine.cable):
                _ip("-n", machine.name, "link", "set", interface, "up")
    except OSError:
        disconnect((first, second))
        raise
    return first, second


def disconnect(machines: Sequence[Machine]) -> None:
    """Takes them away, with all that runs there; the cable goes with its ends."""
    for machine in machines:
        with suppress(OSError, subprocess.CalledProcessError):
            machine.lose()
            _ip("netns", "del", machine.name)


def finish(processes: Sequence[subprocess.Popen], logs: Sequence[Path]) -> None:
    """Waits for processes that have to succeed."""
    deadline = time.monotonic() + TIMEOUT_S
    statuses = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    assert not any(statuses), "\n\n".join(log.read_text()[-6000:] for log in logs)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}")
