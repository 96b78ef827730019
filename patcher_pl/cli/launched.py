"""The processes that a launcher has started, as one group."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from patcher_pl.errors import ConfigError
from patcher_pl.launcher import num_processes_here
from patcher_pl.machine import choose_device

# Judges may take their time while the other processes wait.
_PATIENCE = timedelta(hours=24)


@contextmanager
def launched(device: str) -> Iterator[tuple[DeviceMesh, str]]:
    """Joins the processes of a launcher for the length of the block.

    Args:
        device: `cpu`, `cuda` or `auto`; each process of a machine takes one GPU.

    Yields:
        All processes, and the device of this one.

    Raises:
        ConfigError: If a GPU is named, or a machine has fewer GPUs than processes.
    """
    kind = choose_device(device)
    if kind.index is not None:
        raise ConfigError(
            f"device: {device!r} names one GPU, and several processes need their own."
        )
    by_torchrun = TorchElasticEnvironment.detect()
    cluster = TorchElasticEnvironment() if by_torchrun else SLURMEnvironment()
    local, place = cluster.local_rank(), str(kind)
    if kind.type != "cpu":
        module = torch.get_device_module(kind.type)
        if module.device_count() < num_processes_here():
            raise ConfigError(
                f"device: {num_processes_here()} processes on a machine with {module.device_count()} "
                "GPUs. Start one process per GPU."
            )
        module.set_device(local)
        place = f"{kind.type}:{local}"
    # gloo for what waits in host memory: offloaded shards, jobs and verdicts.
    backend = "gloo" if kind.type == "cpu" else f"cpu:gloo,{kind.type}:nccl"
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{cluster.main_address}:{cluster.main_port}",
        world_size=cluster.world_size(),
        rank=cluster.global_rank(),
        timeout=_PATIENCE,
    )
    yield init_device_mesh(kind.type, (distributed.get_world_size(),)), place
    distributed.destroy_process_group()  # After an error, the others may be waiting: no farewell.
