"""A real SLURM of one node, this machine, that nobody else knows of: Debian's slurm-wlm and munge."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

NODE = "localhost"  # A name that every machine can resolve, as those of a cluster can.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
_MISSING = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
NEEDS_SLURM = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"apt-get install slurm-wlm munge: {_MISSING}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root"),
]
_CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# A node that comes back is used again, and one that is silent is soon given up.
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Starts and stops the daemons, and asks them.

    Args:
        folder: For what the daemons write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        # What a test that runs inside of another job would hand on.
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH"))]:
            del self.environment[name]

    def start(self) -> None:
        """Returns once the node takes jobs."""
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        settings = _CONFIG.format(
            folder=self.folder,
            host=socket.gethostname().partition(".")[0],
            node=NODE,
            controller=_free_port(),
            daemon=_free_port(),
        )
        (self.folder / "slurm.conf").write_text(settings, encoding="utf-8")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        options = [f"--{name}={key.parent / file}" for name, file in files.items()]
        self.run("munged", "--force", *options, f"--seed-file={key.parent / 'seed'}")
        self.run("slurmctld", "-c")
        self.start_node()

    def start_node(self) -> None:
        """Starts the node's daemon."""
        self.run("slurmd", "-N", NODE)
        self.wait_for(lambda: self.node_state == "idle", "an idle node", 60)

    def kill_node(self) -> None:
        """The node's daemon, and everything that its jobs run, die at once."""
        daemons = self._pids("slurmd.pid")
        steps = _children_of("slurmstepd")
        for pid in (*daemons, *steps, *(child for step in steps for child in _family_of(step))):
            _kill(pid)
        (self.folder / "slurmd.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends everything."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root")
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            for pid in self._pids(name):
                _kill(pid, signal.SIGTERM)

    def run(self, *command: object) -> str:
        """Returns what a command prints.

        Raises:
            AssertionError: With everything that it said, if it fails.
        """
        program, *rest = (str(part) for part in command)
        path = shutil.which(program, path=f"{self.environment['PATH']}:{_PATH}")
        assert path is not None, program
        done = subprocess.run(
            [path, *rest], cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *command: object) -> int:
        """Returns the number of a new job."""
        return int(self.run("sbatch", "--parsable", *command).strip())

    def job(self, number: int) -> dict[str, str]:
        """What SLURM says of a job."""
        said = self.run("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    @property
    def node_state(self) -> str:
        return self.run("sinfo", "--noheader", "--format=%T").strip().rstrip("*")

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 300) -> None:
        """Asks twice a second.

        Raises:
            AssertionError: With the daemons' logs, if it is not so in time.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"no {what} in {timeout_s:.0f} s{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("slurm*.log"))
        ends = (f"\n{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)
        return "".join(ends)

    def _pids(self, name: str) -> list[int]:
        file = self.folder / name
        return [int(file.read_text())] if file.is_file() else []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _children_of(name: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"^{name}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _family_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    children = [int(child) for child in found.stdout.split()]
    return [*children, *(one for child in children for one in _family_of(child))]


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
