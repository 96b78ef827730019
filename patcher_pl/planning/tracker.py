"""Follows every tensor of a run from its allocation to its end, and counts FLOPs on the way."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary

from patcher_pl.planning.parts import DEFEND, PER_WEIGHT, Part

# What the CPU runs where a GPU runs flash attention; torch's own table lacks the two.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


# Shares of the weights for which peaks are looked up: whole, split among more and more, none.
_SHARES = (1.0, 0.5, 0.125, 0.0)


@dataclass(eq=False, slots=True)
class _Allocation:
    """One storage: its size, when it lived (by the tracker's clock), and what it was for."""

    num_bytes: int
    shape: tuple[int, ...]
    phase: str
    born: int
    part: Part | None
    died: int | None = None


class Tracker(TorchDispatchMode):
    """Memory by part and FLOPs by phase of everything that runs inside, on real or fake tensors.

    A part may be named when something is allocated (`allocating`) or later (`label`): the breakdown
    of a peak is made at the end, from all that was alive at that moment. What was never named is
    `WEIGHT_TEMPORARIES` if it has the shape of a parameter, otherwise `ACTIVATIONS`. Counted are
    bytes that were asked for; what an allocator adds is not seen here.

    Torch's `MemTracker` knows no parts of this codebase's own (two optimizers, attack vector,
    trajectory), and calls a model only once; hence this one, after its example.
    """

    def __init__(self) -> None:
        super().__init__()
        self._allocations: list[_Allocation] = []
        self._known: Any = WeakIdKeyDictionary()
        self._clock = 0  # Beginnings and ends of storages so far.
        self._phases = [DEFEND]
        self._flops: Counter[str] = Counter()
        self._times_entered: Counter[str] = Counter()
        self._allocated_for: Part | None = None
        self._weight_shapes: set[tuple[int, ...]] = set()

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        return self._phases[-1]

    @contextmanager
    def entering(self, phase: str) -> Iterator[None]:
        """Attributes peaks and FLOPs of the block to `phase`; within itself, it is one phase."""
        self._times_entered[phase] += phase != self.phase
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.pop()

    @contextmanager
    def allocating(self, part: Part) -> Iterator[None]:
        """Names what is allocated within the block."""
        before, self._allocated_for = self._allocated_for, part
        try:
            yield
        finally:
            self._allocated_for = before

    def label(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Names what exists already."""
        for tensor in tensors:
            self._see(tensor)
            self._known[tensor.untyped_storage()][0].part = part

    def label_weights(self, tensors: Iterable[Tensor]) -> None:
        """Names the parameters and buffers of the model, and learns their shapes."""
        tensors = list(tensors)
        self._weight_shapes |= {tuple(tensor.shape) for tensor in tensors if tensor.dim() > 0}
        self.label(tensors, Part.PARAMETERS)

    def peaks(self) -> dict[str, list[dict[Part, int]]]:
        """Returns for every phase what was there when most was: bytes by part.

        One moment if all counts; others if parts per weight are split among devices, so that
        activations weigh more.
        """
        best: dict[tuple[str, float], tuple[float, int]] = {}
        weights = others = 0
        for moment, sign, allocation in self._events():
            change = sign * allocation.num_bytes
            if self._part_of(allocation) in PER_WEIGHT:
                weights += change
            else:
                others += change
            if sign < 0:
                continue
            for share in _SHARES:
                key, found = (allocation.phase, share), (share * weights + others, moment)
                best[key] = max(best.get(key, found), found, key=lambda entry: entry[0])
        moments = {phase: set[int]() for phase, _ in best}
        for (phase, _), (_, moment) in best.items():
            moments[phase].add(moment)
        return {
            phase: [self._parts_at(m) for m in sorted(found)] for phase, found in moments.items()
        }

    def flops(self, phase: str) -> int:
        """Returns the floating-point operations of matrix products and attention in a phase."""
        return self._flops[phase]

    def times_entered(self, phase: str) -> int:
        """Returns how often a phase began."""
        return self._times_entered[phase]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # Questions about a tensor (its device, say); many.
            return result
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self._flops[self.phase] += formula(*args, **kwargs, out_val=result)
        leaves = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        allocation = _Allocation(
            num_bytes=storage.nbytes(),
            shape=tuple(tensor.shape),
            phase=self.phase,
            born=self._clock,
            part=self._allocated_for,
        )
        self._clock += 1
        self._allocations.append(allocation)
        reference = weakref.ref(storage, partial(self._forget, allocation))
        self._known[storage] = (allocation, reference)

    def _forget(self, allocation: _Allocation, _: object) -> None:
        allocation.died = self._clock
        self._clock += 1

    def _events(self) -> list[tuple[int, int, _Allocation]]:
        """Beginnings (+1) and ends (-1) of all storages, in order."""
        events = [(one.born, 1, one) for one in self._allocations]
        events += [(one.died, -1, one) for one in self._allocations if one.died is not None]
        return sorted(events, key=lambda event: event[0])

    def _parts_at(self, moment: int) -> dict[Part, int]:
        """Bytes by part just after `moment`."""
        parts: Counter[Part] = Counter()
        for one in self._allocations:
            if one.born <= moment and (one.died is None or one.died > moment):
                parts[self._part_of(one)] += one.num_bytes
        return dict(parts)

    def _part_of(self, allocation: _Allocation) -> Part:
        if allocation.part is not None:
            return allocation.part
        is_weight = allocation.shape in self._weight_shapes
        return Part.WEIGHT_TEMPORARIES if is_weight else Part.ACTIVATIONS
