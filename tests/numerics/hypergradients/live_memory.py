"""How much memory tensors hold, counted at every operation instead of asked of the system."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, until they are freed.

    What existed before is not counted. The same work gives the same peak on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # An operation that returns a view or its argument makes no memory.
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, counts=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            self._note(leaf, counts=True)
        return result

    def _note(self, leaf: Any, *, counts: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0

        def forget(_: Any) -> None:
            self._seen.pop(key, None)
            self._live -= size

        self._seen[key] = weakref.ref(storage, forget)
        self._live += size
        self.peak = max(self.peak, self._live)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Returns the most that was held at a time by tensors that `work` made."""
    with LiveMemory() as memory:
        work()
    return memory.peak
