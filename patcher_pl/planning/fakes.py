"""Runs training code on tensors that have shapes but no values, and so need neither memory nor time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_READ_SCALAR = torch.ops.aten._local_scalar_dense.default


class _UnitScalars(TorchDispatchMode):
    """Answers 1 (or True) whenever a value is read, since fake tensors have none.

    Losses and norms are then finite and not zero, and every mask has an answer token in it: the way
    of a healthy step.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _READ_SCALAR:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors(tracker: TorchDispatchMode) -> Iterator[None]:
    """Makes every tensor of the block fake; `tracker` sees each of them."""
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, _UnitScalars():
        yield
