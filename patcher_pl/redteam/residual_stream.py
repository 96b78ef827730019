"""The residual stream of a transformer: what is written into it, by which matrices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from patcher_pl.errors import PatcherError
from patcher_pl.models.blocks import blocks_of
from patcher_pl.models.shards import part_of
from patcher_pl.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ResidualStream:
    """Where the residual stream of a model is, found by what modules do and not by their names.

    Args:
        model: The causal LM.
        blocks: Its transformer blocks, in order.
        embeddings: Token and position embeddings, which begin the stream.
        writers: The layers of each block whose output is added to the stream: those of the width of
            the stream whose output is the output of a child of the block (attention, MLP).
    """

    model: "PreTrainedModel"
    blocks: Sequence[nn.Module]
    embeddings: Sequence[nn.Embedding]
    writers: Sequence[Sequence[nn.Module]]

    @classmethod
    def of(cls, model: "PreTrainedModel", batch: Batch) -> "ResidualStream":
        """Finds the stream by reading the first row of `batch`.

        Raises:
            PatcherError: If there are no blocks, no embeddings, or a block without such layers.
        """
        config = model.config.get_text_config()
        blocks = blocks_of(model)
        inside = {module for block in blocks for module in block.modules()}
        embeddings = [
            module
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            and module.embedding_dim == config.hidden_size
            and module not in inside
        ]
        if not embeddings:
            raise _not_found(model, f"embeddings of its width {config.hidden_size}")
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(first := _tensor(output), Tensor):
                outputs[module] = first

        with hooked(dict.fromkeys(inside, keep)):
            read(model, batch, num_rows=1)
        writers = [_writers(block, outputs, config.hidden_size) for block in blocks]
        for number, found in enumerate(writers):
            if not found:
                raise _not_found(model, f"linear layers that write to it in block {number}")
        return cls(model, blocks, embeddings, writers)

    def last_positions(self, batch: Batch) -> Float[Tensor, "batch layers width"]:
        """The stream after every block, at the last token of each prompt, in float32."""
        last = batch["attention_mask"].sum(dim=1) - 1
        rows = torch.arange(len(last), device=last.device)
        found: dict[nn.Module, Tensor] = {}

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            found[block] = _tensor(output)[rows, last].float()

        with hooked(dict.fromkeys(self.blocks, keep)):
            read(self.model, batch)
        return torch.stack([found[block] for block in self.blocks], dim=1)

    def written(
        self, batch: Batch, directions: Float[Tensor, "layers width"]
    ) -> tuple[Float[Tensor, " writes"], Float[Tensor, " writes"]]:
        """How much the embeddings and then each block write along a direction (root mean squares).

        Args:
            batch: What is read.
            directions: Unit vectors, one per block; the embeddings are measured along the first.

        Returns:
            The component of each write along its direction, and the size that rounding gives such a
            component: the stream's own per dimension, times the precision of its number format.
        """
        real = batch["attention_mask"].bool()
        begins: dict[nn.Module, Tensor] = {}
        components, noises = [], []

        def note(write: Tensor, stream: Tensor, direction: Tensor) -> None:
            components.append((write[real].float() @ direction).square().mean().sqrt())
            precision = torch.finfo(stream.dtype).eps
            noises.append(precision * stream[real].float().square().mean().sqrt())

        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            begins[block] = args[0] if args else kwargs["hidden_states"]
            if block is self.blocks[0]:
                note(begins[block], begins[block], directions[0])

        def after(block: nn.Module, _: Any, output: Any) -> None:
            direction = directions[list(self.blocks).index(block)]
            note(_tensor(output) - begins.pop(block), _tensor(output), direction)

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.enter_context(hooked(dict.fromkeys(self.blocks, after)))
            read(self.model, batch)
        return torch.stack(components), torch.stack(noises)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Everything that writes, each with the number of its block; 0 for the embeddings."""
        for module in self.embeddings:
            yield 0, module
        for number, found in enumerate(self.writers):
            for module in found:
                yield number, module

    @contextmanager
    def without(self, direction: Float[Tensor, " width"]) -> Iterator[None]:
        """Projects a unit vector out of everything that is written, for the length of the block."""

        def project(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            unit = direction.to(output)
            return output - (output @ unit).unsqueeze(-1) * unit

        with hooked({module: project for _, module in self.layers()}):
            yield


@torch.no_grad()
def remove_direction_(module: nn.Module, direction: Float[Tensor, " width"]) -> None:
    """Makes a layer's outputs orthogonal to a unit vector, in place: W - r r^T W, b - r r^T b.

    Calculates in float32 at least. Of a spread layer, one whole matrix at a time is on every process.
    """
    weight: Any = module.weight
    # Embeddings and GPT-2's Conv1D have their outputs along the last axis.
    _project_out_(weight, direction, axis=0 if isinstance(module, nn.Linear) else -1)
    bias: Any = getattr(module, "bias", None)
    if bias is not None:
        _project_out_(bias, direction, axis=0)


def _project_out_(tensor: Tensor, direction: Float[Tensor, " width"], axis: int) -> None:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    wide = torch.promote_types(whole.dtype, torch.float32)
    unit, along = direction.to(whole.device, wide), whole.to(wide).movedim(axis, -1)
    changed = (along - (along @ unit).unsqueeze(-1) * unit).movedim(-1, axis)
    if isinstance(tensor, DTensor):
        local = distribute_tensor(changed, tensor.device_mesh, tensor.placements)
        part_of(tensor).copy_(part_of(local))
    else:
        tensor.copy_(changed)


@torch.no_grad()
def read(model: "PreTrainedModel", batch: Batch, num_rows: int | None = None) -> None:
    """Runs the model on a batch, or its first rows, for its hooks, without its output head."""
    ids, mask = batch["input_ids"][:num_rows], batch["attention_mask"][:num_rows]
    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Forward hooks for the length of the block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _writers(block: nn.Module, outputs: dict[nn.Module, Tensor], width: int) -> Sequence[nn.Module]:
    ends = [outputs[child] for child in block.children() if child in outputs]
    return [
        module
        for module in block.modules()
        if module in outputs
        and _num_outputs(module) == width
        and any(torch.equal(outputs[module], end) for end in ends)
    ]


def _num_outputs(module: nn.Module) -> int | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if isinstance(module, Conv1D) else None


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _not_found(model: nn.Module, what: str) -> PatcherError:
    return PatcherError(
        f"Abliteration cannot find the residual stream of {type(model).__name__}: it has no {what}. "
        "Leave this attack away for such a model."
    )
