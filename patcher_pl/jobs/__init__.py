"""Jobs that leave a file each, and what runs them: red teams, ablations, sweeps, comparisons."""

from patcher_pl.jobs.engine import Engine, InProcess, require_one_process, run_missing
from patcher_pl.jobs.fit import (
    ConfigFile,
    Fit,
    OptionValue,
    choose_engine,
    plan_sweep,
    run_fits,
    seed_options,
)
from patcher_pl.jobs.job import Job
from patcher_pl.jobs.processes import Processes
from patcher_pl.jobs.ray_cluster import RayCluster
from patcher_pl.jobs.run_directory import RunDirectory
from patcher_pl.jobs.slurm_array import SlurmArray

__all__ = [
    "ConfigFile",
    "Engine",
    "Fit",
    "InProcess",
    "Job",
    "OptionValue",
    "Processes",
    "RayCluster",
    "RunDirectory",
    "SlurmArray",
    "choose_engine",
    "plan_sweep",
    "require_one_process",
    "run_fits",
    "run_missing",
    "seed_options",
]
