"""Putting a SLURM job back into the queue."""

import logging
import os
import subprocess

_log = logging.getLogger(__name__)


def requeue_job() -> None:
    """Asks SLURM to run this process's job again later; does nothing outside of one.

    A refusal is logged: the checkpoint is there, and the job can be submitted again by hand.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        _log.warning("SLURM job %s was not requeued: %s", job, error.stderr.strip())
    except OSError as error:
        _log.warning("SLURM job %s was not requeued: %s", job, error)
    else:
        _log.warning("SLURM job %s is requeued.", job)
