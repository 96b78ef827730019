"""Follows every tensor of a run from its allocation to its end, on real tensors or on fake ones."""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary

# Phases of a run.
DEFEND, ATTACK, HYPERGRADIENT = "defend", "attack", "hypergradient"


class Part(StrEnum):
    """What a tensor is for; the value is what a report calls it."""

    PARAMETERS = "parameters and buffers"
    GRADIENTS = "gradients"
    DEFENDER_OPTIMIZER = "defender's optimizer"
    ATTACKER_OPTIMIZER = "attacker's optimizer"
    ATTACK_VECTOR = "attack vector"
    SAVED_WEIGHTS = "saved theta"
    TRAJECTORY = "trajectory"
    WEIGHT_TEMPORARIES = "other weight-shaped"
    ACTIVATIONS = "activations"
    GATHERED = "gathered layers"
    FRAMEWORK = "framework"


Parts = Mapping[Part, int]  # Bytes of every part.

# Parts with one entry per weight: what sharding divides by the number of devices.
PER_WEIGHT = frozenset(Part) - {Part.ACTIVATIONS, Part.GATHERED, Part.FRAMEWORK}

# Shares of the weights for which peaks are looked up: whole, split among more and more, none.
_SHARES = (1.0, 0.5, 0.125, 0.0)

# What the CPU runs where a GPU runs flash attention; torch's own table lacks the two.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(eq=False, slots=True)
class _Allocation:
    num_bytes: int
    shape: tuple[int, ...]
    phase: str
    part: Part | None


class Tracker(TorchDispatchMode):
    """Memory by part, and FLOPs by phase, of everything that runs inside.

    What a tensor is for is read off the call stack: the innermost function of `sites` that is at work
    names its part, and its phase. A part may also be named later (`label`), since peaks are looked up
    at the end. What was never named is `WEIGHT_TEMPORARIES` if it has the shape of a parameter,
    otherwise `ACTIVATIONS`. Counted are bytes that were asked for; what an allocator adds is not seen.
    Of tensors that are made of others (8 bits and their scales), those are counted.

    Torch's `MemTracker` knows no parts of this codebase's own (two optimizers, attack vector,
    trajectory), and calls a model only once; hence this one, after its example. Torch's
    `FlopCounterMode` would keep alive what checkpointing recomputes; hence its formulas alone.

    Args:
        sites: Functions, and the part or phase of what is allocated in them.
        fused: Functions that a real run compiles into one kernel, which keeps nothing in between.
    """

    def __init__(
        self,
        sites: Mapping[Callable[..., Any], Part | str] | None = None,
        fused: Iterable[Callable[..., Any]] = (),
    ) -> None:
        super().__init__()
        self._sites = {inspect.unwrap(site).__code__: name for site, name in (sites or {}).items()}
        self._fused = {inspect.unwrap(function).__code__ for function in fused}
        self._known: Any = WeakIdKeyDictionary()
        self._events: list[tuple[int, _Allocation]] = []  # Beginnings (1) and ends (-1), in order.
        self._weight_shapes: set[tuple[int, ...]] = set()
        self.flops: Counter[str] = Counter()  # Of matrix products and attention, by phase.

    def label(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Names what exists already; from parameters, it learns the shapes of weights."""
        for tensor in leaves_of(tensors):
            self._see(tensor)
            self._known[tensor.untyped_storage()][0].part = part
            if part == Part.PARAMETERS and tensor.dim() > 0:
                self._weight_shapes.add(tuple(tensor.shape))

    def peaks(self) -> dict[str, list[dict[Part, int]]]:
        """Returns for every phase what was there when most was: bytes by part.

        One moment if all counts; others if parts per weight are split among devices, so that
        activations weigh more.
        """
        best: dict[tuple[str, float], tuple[float, int]] = {}
        weights = others = 0
        for moment, (sign, one) in enumerate(self._events):
            if self._part_of(one) in PER_WEIGHT:
                weights += sign * one.num_bytes
            else:
                others += sign * one.num_bytes
            # A peak is reached by an allocation, never by the end of one.
            for share in _SHARES if sign > 0 else ():
                size, key = share * weights + others, (one.phase, share)
                if key not in best or size > best[key][0]:
                    best[key] = size, moment
        moments = sorted({(phase, moment) for (phase, _), (_, moment) in best.items()})
        found = {phase: [] for phase, _ in best}
        for phase, moment in moments:
            found[phase].append(self._parts_at(moment))
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(one) for one in types):
            return NotImplemented  # Its own operations come here one by one.
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # Questions about a tensor (its device, say); many.
            return result
        formula = _FLOPS.get(func.overloadpacket)
        if formula is not None:
            phase, _ = self._purpose() or (DEFEND, None)
            self.flops[phase] += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            purpose = self._purpose()
            if purpose is None:
                return
            one = _Allocation(storage.nbytes(), tuple(tensor.shape), *purpose)
            # By storage, since views share one: memory ends when the last of them does.
            end = weakref.ref(storage, lambda _: self._events.append((-1, one)))
            self._known[storage] = one, end
            self._events.append((1, one))

    def _purpose(self) -> tuple[str, Part | None] | None:
        """The phase and, if it is told, the part of what is allocated now; None in a fused function."""
        part, frame = None, inspect.currentframe()
        while frame is not None:
            if frame.f_code in self._fused:
                return None
            name = self._sites.get(frame.f_code)
            if isinstance(name, Part):
                part = part or name
            elif name is not None:
                return name, part
            frame = frame.f_back
        return DEFEND, part

    def _parts_at(self, moment: int) -> dict[Part, int]:
        parts: Counter[Part] = Counter()
        for sign, one in self._events[: moment + 1]:
            parts[self._part_of(one)] += sign * one.num_bytes
        return dict(+parts)

    def _part_of(self, one: _Allocation) -> Part:
        is_weight = one.shape in self._weight_shapes
        return one.part or (Part.WEIGHT_TEMPORARIES if is_weight else Part.ACTIVATIONS)


def leaves_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that hold the memory of others."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from leaves_of(getattr(tensor, name) for name in names)
        else:
            yield tensor


class _UnitScalars(TorchDispatchMode):
    """Answers 1 (or True) whenever a value is read: losses are finite, and every mask has an answer."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors(tracker: Tracker) -> Iterator[None]:
    """Makes every tensor of the block fake: with a shape, but no values, so without memory or time."""
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, _UnitScalars():
        yield
