"""The one owner of a live model's weights while an attack shifts them back and forth."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from patcher_pl.models.fsdp1 import without_units
from patcher_pl.models.lora import plain_name
from patcher_pl.models.shards import Shards, part_of, reshard, whole

Vector = list[Tensor]
Place = Literal["model", "host"]


class Weights:
    """Snapshots, shifts and restores the weights of a module, in place and to the last bit.

    The parameters are looked up once. What adapters hold is not part of them: an attacker gets the
    merged model, and a change of a merged weight is a change of the weight under the adapter.

    A forward pass and its backward pass must both lie inside, or both outside, a `shifted` block:
    the backward pass reads the weights again.

    Where FSDP shards the module, every vector here holds this process's part of each weight.

    Args:
        module: Model whose weights are owned. Its parameters must not be replaced afterwards.
        copies_on: Where snapshots, differences and the saved weights of a shift are kept: beside
            the `model`, or in `host` memory, from which every shift copies them.
        trained_only: Own exactly what is trainable instead: the adapters, where there are any.
    """

    def __init__(
        self, module: nn.Module, copies_on: Place = "model", *, trained_only: bool = False
    ) -> None:
        reshard(module)  # Or the root's parameters might be gathered copies, soon to be dropped.
        if trained_only:
            named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        else:
            named = {
                plain: parameter
                for name, parameter in module.named_parameters()
                if (plain := plain_name(without_units(name))) is not None
                and parameter.is_floating_point()
            }
        self._module, self._module_parameters = module, list(module.parameters())
        self.names: list[str] = list(named)
        self.parameters: list[nn.Parameter] = list(named.values())
        self.shards = Shards(module, self.parameters)
        self._copies_on = copies_on
        self._buffer: Vector | None = None
        self._shifted = False

    @torch.no_grad()
    def snapshot(self) -> Vector:
        """Returns an independent copy of the weights."""
        return [tensor.to(self._place(tensor), copy=True) for tensor in self.shards.tensors]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Puts saved weights back, bit for bit."""
        with self.shards.changing() as tensors:
            torch._foreach_copy_(tensors, list(saved))  # type: ignore[attr-defined]

    def add(self, vector: Sequence[Tensor], scale: float = 1.0) -> None:
        """Moves the weights by `scale` times a vector, for good; `restore` is the way back."""
        with self.shards.changing() as tensors:
            # One at a time: the vector may wait elsewhere.
            for tensor, change in zip(tensors, vector, strict=True):
                tensor.add_(change.to(tensor.device), alpha=scale)

    @torch.no_grad()
    def edit(self, change: Callable[[str, Tensor], Tensor | None]) -> None:
        """Gives the weights new values, for good, one whole weight after the other.

        Where the module is sharded, every process gathers each weight and keeps its part of the
        first process's result; all of them must call it.

        Args:
            change: Gets name and value of a weight and returns the new value, cast to the number
                format of the old one; None leaves it.
        """
        with self.shards.changing() as tensors:
            for name, parameter, tensor in zip(self.names, self.parameters, tensors, strict=True):
                new = change(name, whole(parameter.detach()))
                if new is None:
                    continue
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    new = part_of(distribute_tensor(new, mesh, placements))
                tensor.copy_(new)

    @torch.no_grad()
    def difference(self, saved: Sequence[Tensor]) -> Vector:
        """Returns current weights minus `saved`: the attack vector where an attack lies between."""
        return [
            (tensor - value.to(tensor.device)).to(self._place(tensor))
            for tensor, value in zip(self.shards.tensors, saved, strict=True)
        ]

    @torch.no_grad()
    def update_of(self, adapted: nn.Module) -> Vector:
        """Returns what merging the adapters of a model would add to these weights, zeros elsewhere.

        Args:
            adapted: The module with fresh adapters around these weights.
        """
        from peft.tuners.lora import LoraLayer

        updates: dict[int, Tensor] = {}
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                weight: Any = layer.get_base_layer().weight
                update: Any = layer.get_delta_weight("default")  # type: ignore[operator]
                if isinstance(weight, DTensor):
                    update = distribute_tensor(update, weight.device_mesh, weight.placements)
                updates[id(weight)] = part_of(update).to(weight.dtype)
        return [
            updates[id(parameter)] if id(parameter) in updates else torch.zeros_like(tensor)
            for parameter, tensor in zip(self.parameters, self.shards.tensors, strict=True)
        ]

    def placed(self, vector: Sequence[Tensor]) -> Vector:
        """Returns a vector, one read from a checkpoint for example, where copies are kept."""
        return [
            value.to(self._place(tensor))
            for tensor, value in zip(self.shards.tensors, vector, strict=True)
        ]

    def aligned(self, tensors: Sequence[Tensor], names: Sequence[str]) -> Vector:
        """Returns tensors that are named as in another model in the order of these weights."""
        by_name = dict(zip(names, tensors, strict=True))
        return [by_name[name] for name in self.names]

    @contextmanager
    def shifted(self, vector: Sequence[Tensor]) -> Iterator[None]:
        """Moves the weights by `vector` for the length of the block, then restores them exactly.

        Adding and then subtracting would drift in low precision. Whole weights are left alone: the
        parameters get other memory, which holds weights plus vector, and then their own back. Where
        FSDP shards them, or copies lie elsewhere, they are saved, changed in place and copied back.
        The space for one more set of weights is kept for the next time.

        Raises:
            RuntimeError: If the weights are shifted already, or a sharded model is between a forward
                pass and its backward pass, here or at the end of the block.
        """
        place = partial(self._swapped, vector) if self._swaps else partial(self._moved, vector)
        with self._elsewhere("Weights.shifted", place):
            yield

    @contextmanager
    def replaced(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Puts other values in place of the weights for the length of the block, then restores them.

        Raises:
            RuntimeError: As `shifted` does.
        """
        with self._elsewhere("Weights.replaced", partial(self._overwritten, values)):
            yield

    @contextmanager
    def trainable(self) -> Iterator[list[nn.Parameter]]:
        """Makes exactly the owned weights trainable for the length of the block, then as before.

        Gradients that had been accumulated are set aside meanwhile and put back.

        Raises:
            RuntimeError: If a sharded model is between a forward pass and its backward pass.
        """
        self.shards.require_no_open_pass("Weights.trainable")
        # FSDP2 looks at what is trainable when it gathers, and may have gathered already.
        reshard(self._module)
        owned = {id(parameter) for parameter in self.parameters}
        before = [(p, p.requires_grad, p.grad) for p in self._module_parameters]
        for parameter, _, _ in before:
            # Set aside, not only switched off: the attack takes gradients of its own, by the same
            # parameters.
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in owned)
        try:
            yield self.parameters
        finally:
            reshard(self._module)
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

    @contextmanager
    def _elsewhere(
        self, action: str, place: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        if self._shifted:
            raise RuntimeError(f"{action} must not be entered twice; leave the first block.")
        self.shards.require_no_open_pass(action)
        self._shifted = True
        try:
            with place():
                yield
                # A forward pass within the block whose backward pass came after it would
                # differentiate at theta.
                self.shards.require_no_open_pass(f"The end of {action}")
        finally:
            self._shifted = False

    @property
    def _swaps(self) -> bool:
        """Whether parameters may point to other memory: they are whole, and so are the copies."""
        return not self.shards.is_sharded and all(
            self._place(tensor) == tensor.device for tensor in self.parameters
        )

    def _place(self, tensor: Tensor) -> torch.device:
        return tensor.device if self._copies_on == "model" else torch.device("cpu")

    @contextmanager
    def _swapped(self, vector: Sequence[Tensor]) -> Iterator[None]:
        space = self._shift_space()
        # References, not copies: the weights stay where they are while the parameters point
        # elsewhere, so that nothing has to be rounded back.
        own = [parameter.data for parameter in self.parameters]
        with torch.no_grad():
            for sum_, tensor, change in zip(space, own, vector, strict=True):
                torch.add(tensor, change.to(tensor.device, non_blocking=True), out=sum_)
        try:
            self._point_to(space)
            yield
        finally:
            self._point_to(own)

    def _point_to(self, tensors: Sequence[Tensor]) -> None:
        with self.shards.changing():
            for parameter, tensor in zip(self.parameters, tensors, strict=True):
                parameter.data = tensor
        # For autograd this is a change in place: a backward pass of what was computed before fails.
        torch.autograd.graph.increment_version(self.parameters)

    @contextmanager
    def _moved(self, vector: Sequence[Tensor]) -> Iterator[None]:
        with self._saved():
            with self.shards.changing() as tensors:
                if self._copies_on == "model":
                    torch._foreach_add_(tensors, list(vector))  # type: ignore[attr-defined]
                else:  # One at a time, so that they need no space beside the model.
                    for tensor, change in zip(tensors, vector, strict=True):
                        tensor.add_(change.to(tensor.device, non_blocking=True))
            yield

    @contextmanager
    def _overwritten(self, values: Sequence[Tensor]) -> Iterator[None]:
        with self._saved():
            self.restore(values)
            yield

    @contextmanager
    def _saved(self) -> Iterator[None]:
        """Puts the weights back at the end of the block."""
        saved = self._shift_space()
        with torch.no_grad():
            torch._foreach_copy_(saved, self.shards.tensors)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.restore(saved)

    def _shift_space(self) -> Vector:
        """Memory for one set of weights, kept for the next time."""
        # Moving or casting the model between two shifts gives it other tensors; the space must
        # follow.
        like = [(tensor, self._place(tensor)) for tensor in self.shards.tensors]
        if self._buffer is None or any(
            (space.device, space.dtype) != (place, tensor.dtype)
            for space, (tensor, place) in zip(self._buffer, like, strict=True)
        ):
            self._buffer = [torch.empty_like(tensor, device=place) for tensor, place in like]
        return self._buffer
