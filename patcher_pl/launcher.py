"""Whether a launcher has started this process as one of several: torchrun, or SLURM's srun."""

import os
import re

# Where launchers say how many there are. Not SLURM_NTASKS, which a batch script has, too, that starts
# one process alone.
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def num_processes() -> int:
    """How many processes the launcher has started for this command (>= 1)."""
    return int(next((count for name in COUNTS if (count := os.environ.get(name))), 1))


def rank() -> int:
    """Which of them this one is (>= 0)."""
    if num_processes() == 1:
        return 0
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def launch() -> str:
    """Names the start of this step of a SLURM job, the same for all its processes and never again."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(os.environ.get(name, "0") for name in names)


def num_processes_here() -> int:
    """How many of them are on this machine (>= 1)."""
    if num_processes() == 1:
        return 1
    by_slurm = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(os.environ.get("LOCAL_WORLD_SIZE") or (by_slurm.group() if by_slurm else 1))
