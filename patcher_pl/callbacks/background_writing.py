"""Checkpoints that are written while training goes on, from a copy in host memory."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import distributed
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from patcher_pl.callbacks.checkpoint_files import agree_on_written, file_error, folder_error
from patcher_pl.defenses.strategies import shards


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread.

    `torch.distributed.checkpoint.async_save` and Lightning's `AsyncCheckpointIO` end before a folder
    has its name, `last.ckpt` points to it and all processes know whether it is whole; these must not
    be the business of a training step. So the whole of it is done in the thread.

    Several processes make one each, at the same time.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        # In a group of its own: in that of training, messages of the two threads would be mistaken
        # for each other. NCCL would need the device, too.
        several = trainer.world_size > 1
        self._group: Any = distributed.new_group(backend="gloo") if several else None
        self._writing: Future[None] | None = None

    def begin(self, path: Path, then: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Copies the state of the run into host memory and lets the thread write it.

        The one before must have been waited for.

        Args:
            path: A file, or the folder of several processes.
            then: What the first process does, in the thread, once the checkpoint is there.
            on_failure: Called in the thread where it could not be written.
        """
        assert self._writing is None
        content = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        in_parts = shards(self._trainer)
        write = self._write_folder if in_parts else self._write_file
        # Where the first process has it all, the others have nothing to keep.
        kept = in_host_memory(content) if in_parts or self._trainer.is_global_zero else {}
        self._writing = self._executor.submit(write, kept, path, then)
        self._writing.add_done_callback(lambda done: on_failure() if done.exception() else None)

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
            CheckpointError: On all processes, if what was being written could not be; told once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread, once it is done."""
        self._executor.shutdown()
        if self._group is not None:
            distributed.destroy_process_group(self._group)

    def _write_file(self, content: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
        agree_on_written(self._any_of, file_error(self._trainer, content, path, then), path)

    def _write_folder(self, content: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
        first = distributed.get_rank() == 0
        error = folder_error(first, lambda to: self._save_parts(content, to), path, then)
        agree_on_written(self._any_of, error, path)

    def _any_of(self, failed: bool, **_: bool) -> bool:
        if self._group is None:
            return failed
        count = torch.tensor(int(failed))
        distributed.all_reduce(count, distributed.ReduceOp.MAX, group=self._group)
        return bool(count)

    def _save_parts(self, content: dict[str, Any], path: Path) -> None:
        """What Lightning's ModelParallelStrategy does, in a group of one's own."""
        named = [path]
        distributed.broadcast_object_list(named, src=0, group=self._group)
        folder = named[0]
        folder.mkdir(parents=True, exist_ok=True)
        others = dict(content)
        parts = {"state_dict": others.pop("state_dict")}
        for number, state in enumerate(others.pop("optimizer_states")):
            parts[f"optimizer_{number}"] = state
        state_dict_saver.save(parts, checkpoint_id=folder, process_group=self._group)
        if distributed.get_rank() == 0:
            torch.save(others, folder / _METADATA_FILENAME)


def in_host_memory(content: Any) -> Any:
    """Returns a copy that training does not change: tensors in host memory, tied ones tied still."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    copies: dict[Any, torch.Tensor] = {}
    memo = {}
    for tensor in tensors:
        place = _place(tensor)
        if place not in copies:
            copies[place] = _copied(tensor.detach())
        memo[id(tensor)] = copies[place]
    return copy.deepcopy(content, memo)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.to("cpu", copy=True)
    # Those of torchao (8 bits and their scales) take no notice of `copy`, alone or within a shard.
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}  # A shard has its mesh there, too.
    inner = {
        name: _copied(part) if isinstance(part, torch.Tensor) else part
        for name, part in parts.items()
    }
    kind: Any = type(tensor)
    return kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def _place(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are one in memory, such as those of a tied output head."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    kind = (type(tensor), tensor.shape, own.dtype, own.shape, own.stride())
    # An empty one is nowhere.
    return (own.data_ptr() or id(tensor), own.device, *kind)
