"""Models that are spread over processes with FSDP2: loading, sharding, and gathering again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.models import fsdp1
from patcher_pl.models.blocks import find_blocks
from patcher_pl.models.lora import attached_like, without_adapters
from patcher_pl.models.peers import is_spread, remember
from patcher_pl.models.shards import watch_open_passes
from patcher_pl.reports.settings import NO_OUTCOME
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ComputeDtype = Literal["float32", "bfloat16", "float64"]
Answers = Literal["auto", "whole", "shards"]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 treats a model: every decoder layer is gathered when it is needed, and dropped again.

    Parameters, gradients, optimizer states, attack vector and saved weights are spread evenly over
    the processes and kept in the number format of the model.

    Args:
        num_replicas: Copies of the model (count, >= 1, a divisor of the number of processes). Each is
            spread over as many neighbouring processes, and gradients are averaged over the copies
            (HSDP).
        param_dtype: Number format of gathered weights, and thus of the computation; None keeps that
            of the model. `bfloat16` with a float32 model is mixed precision.
        reduce_dtype: Number format in which gradients are averaged; None takes that of the gradients.
        reshard_after_forward: Drop gathered layers after the forward pass and gather them once more
            for the backward pass. Off, the whole model lies on every device in between.
        cpu_offload: Keep shards, gradients and optimizer states in host memory; steps are taken on
            the CPU.
        answers: How a red team has questions answered: every process gathers the `whole` model, in
            `param_dtype`, and answers its share of them; or passes go over `shards`, and all
            processes answer all questions together. `auto` gathers where that takes at most 60 % of
            the memory that is free on every device.

    References:
        Zhao et al., 2023, https://arxiv.org/abs/2304.11277; torch.distributed.fsdp.fully_shard.

    Raises:
        ValueError: If `num_replicas` is below 1.
    """

    num_replicas: int = field(default=1, metadata=NO_OUTCOME)
    param_dtype: ComputeDtype | None = None
    reduce_dtype: ComputeDtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    # The same answers, so that no attack is repeated for it.
    answers: Answers = field(default="auto", metadata=NO_OUTCOME)

    def __post_init__(self) -> None:
        remedy = "Use 1 to spread one model over all processes."
        require(self, self.num_replicas >= 1, "num_replicas", ">= 1", remedy)

    def require_divides(self, num_processes: int) -> None:
        """Refuses copies that cannot be spread evenly.

        Raises:
            ConfigError: If `num_replicas` does not divide the number of processes.
        """
        if num_processes % self.num_replicas:
            raise ConfigError(
                f"LanguageModel.sharding.num_replicas must divide the number of processes, "
                f"{num_processes}, got {self.num_replicas}. Change one of them."
            )

    def load(
        self,
        load_whole: Callable[[], "PreTrainedModel"],
        make_empty: Callable[[], "PreTrainedModel"],
        mesh: DeviceMesh,
    ) -> "PreTrainedModel":
        """Returns a sharded model of which one process alone ever holds all weights, in host memory.

        Args:
            load_whole: Loads the model; called on the first process.
            make_empty: Returns the same model without values, on the meta device.
            mesh: Processes to spread it over (one dimension).

        Raises:
            ConfigError: If they cannot be divided among the copies.
            PatcherError: On all processes, if loading fails on the first.
        """
        mesh = self._with_replicas(mesh)
        # One process reads the disk or the hub; eight of them would each need host memory for the
        # model.
        whole = on_first_process(load_whole)
        model = make_empty()
        device = _device_of(mesh)
        # Sharded while still on the meta device: memory is given to the shards alone.
        self.apply(model, mesh)
        model.to_empty(device="cpu" if self.cpu_offload else device)
        set_model_state_dict(
            model,
            {} if whole is None else whole.state_dict(),
            options=StateDictOptions(
                full_state_dict=True, broadcast_from_rank0=True, cpu_offload=self.cpu_offload
            ),
        )
        # Those that no state dict has, such as the frequencies of rotary embeddings.
        values = {} if whole is None else dict(whole.named_buffers())
        for name, buffer in list(model.named_buffers()):
            sent = values.get(name, buffer).to(device, buffer.dtype).contiguous()
            torch.distributed.broadcast(sent, src=0)
            module, _, own_name = name.rpartition(".")
            model.get_submodule(module)._buffers[own_name] = sent
        if whole is not None:
            inner = without_adapters(model)
            inner.generation_config = without_adapters(whole).generation_config
        _begin(model)
        return model.eval()

    def _with_replicas(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same processes in two dimensions, neighbours in the second, where there are copies."""
        self.require_divides(mesh.size())
        if self.num_replicas == 1:
            return mesh
        shape = self.num_replicas, mesh.size() // self.num_replicas
        return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))

    def wrap(self, model: "PreTrainedModel", device: torch.device) -> "PreTrainedModel":
        """Returns a whole model sharded with FSDP1, which computes on `device`."""
        dtypes = _dtype(self.param_dtype), _dtype(self.reduce_dtype)
        wrapped: Any = fsdp1.wrap(model, device, *dtypes)
        return wrapped

    def apply(self, model: "PreTrainedModel", mesh: DeviceMesh) -> None:
        """Shards every decoder layer, then what is left, in place, adapters with the layers."""
        # The root is what attacks run once adapters have been merged, and `generate` runs by itself.
        model = without_adapters(model)
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        settings: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=_dtype(self.param_dtype), reduce_dtype=_dtype(self.reduce_dtype)
            ),
            "offload_policy": offload,
        }
        for block in find_blocks(model):
            fully_shard(block, **settings)
        # The root's own weights are needed last and first: keep them gathered in between.
        fully_shard(model, **{**settings, "reshard_after_forward": None})
        watch_open_passes(model)
        remember(model, self)


def _begin(model: "PreTrainedModel") -> None:
    """Lets FSDP2 choose the number formats of gradients, for all weights.

    It does so once, by what is trainable then; under adapters, an attack trains the others.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    without_adapters(model)._get_fsdp_state()._lazy_init()
    for parameter in frozen:
        parameter.requires_grad_(False)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards the model."""
    return is_spread(model) or fsdp1.uses_fsdp1(model)


def gathered(model: "PreTrainedModel") -> "PreTrainedModel | None":
    """Returns a plain copy of a sharded model in host memory, on the first process; None on others.

    All processes must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if fsdp1.uses_fsdp1(model):
        state: Any = fsdp1.whole_state(model)  # type: ignore[arg-type]
        model = fsdp1.unwrapped(model)
    else:
        state = get_model_state_dict(model, options=options)
    if torch.distributed.get_rank() != 0:
        return None
    inner = without_adapters(model)
    plain_class: Any = next(
        kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule)
    )
    # Without values, so that `assign` takes the gathered tensors as they are instead of copying
    # them.
    with torch.device("meta"):
        plain = attached_like(model, plain_class(inner.config))
    plain.load_state_dict(state, assign=True)
    # `assign` has given a tied head a tensor of its own.
    plain.tie_weights()
    buffers = {fsdp1.without_units(name): buffer for name, buffer in model.named_buffers()}
    for name, _ in list(plain.named_buffers()):
        module, _, own_name = name.rpartition(".")
        plain.get_submodule(module)._buffers[own_name] = buffers[name].detach().cpu().clone()
    without_adapters(plain).generation_config = inner.generation_config
    return plain.eval()


def on_first_process(function: Callable[[], Result]) -> Result | None:
    """Returns what `function` returns on the first process, None on others, once it is done.

    Raises:
        PatcherError: On all processes, if it is raised on the first: none is left waiting.
        OSError: Likewise.
    """
    result, error = None, None
    if torch.distributed.get_rank() == 0:
        try:
            result = function()
        except (PatcherError, OSError) as raised:
            error = raised
    # Sent to all, so that no process waits for a collective that the first one never reaches.
    shared = [error]
    torch.distributed.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise shared[0]
    return result


def _dtype(name: ComputeDtype | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(mesh.device_type)
    return torch.device(mesh.device_type, module.current_device())
