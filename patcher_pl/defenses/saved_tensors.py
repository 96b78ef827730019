"""Vectors and optimizer states in checkpoints of one process (a file) and of several (a folder).

A folder holds shards that `torch.distributed.checkpoint` puts together again for any number of
processes; a file holds everything whole. Either can be read by a run of either kind.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from patcher_pl.models import Weights
from patcher_pl.models.shards import part_of


def add_vector(
    checkpoint: dict[str, Any], key: str, weights: Weights, vector: Sequence[Tensor]
) -> None:
    """Adds a vector in the order of `weights` to a checkpoint that is about to be written."""
    named = dict(zip(weights.names, vector, strict=True))
    checkpoint["defense"][f"has_{key}"] = True
    if not weights.shards.is_sharded:
        checkpoint["defense"][key] = named
        return
    if not isinstance(weights.parameters[0], DTensor):  # FSDP1: shards of another layout.
        checkpoint["state_dict"] |= {
            _name_of_part(key, name): part.contiguous() for name, part in named.items()
        }
        return
    sharded = zip(named.items(), weights.parameters, strict=True)
    # What is in the state dict is written by every process, in parts.
    checkpoint["state_dict"] |= {
        f"{key}.{name}": _as_sharded(part, parameter) for (name, part), parameter in sharded
    }


def add_vectors(
    checkpoint: dict[str, Any], key: str, weights: Weights, vectors: Sequence[Sequence[Tensor]]
) -> None:
    """Adds several vectors: the last as `add_vector` does, the others under numbered keys."""
    for number, vector in enumerate(vectors[:-1]):
        add_vector(checkpoint, f"{key}_{number}", weights, vector)
    for vector in vectors[-1:]:
        add_vector(checkpoint, key, weights, vector)


def read_vectors(
    checkpoint: dict[str, Any], key: str, weights: Weights, path: Any
) -> list[Sequence[Tensor]]:
    """Returns what `add_vectors` put into a checkpoint; see `read_vector`."""
    found: list[Sequence[Tensor]] = []
    while (vector := read_vector(checkpoint, f"{key}_{len(found)}", weights, path)) is not None:
        found.append(vector)
    last = read_vector(checkpoint, key, weights, path)
    return found if last is None else [*found, last]


def read_vector(
    checkpoint: dict[str, Any], key: str, weights: Weights, path: Any
) -> list[Tensor] | None:
    """Returns what `add_vector` put into a checkpoint that was read, or None where it did not.

    Args:
        checkpoint: As read; a vector among the weights is taken out.
        key: Name of the vector.
        weights: In whose order, and parts, it is returned.
        path: Where the checkpoint was read from.
    """
    if not checkpoint["defense"].get(f"has_{key}", False):
        return None
    whole = checkpoint["defense"].get(key)
    if whole is None and "state_dict" in checkpoint:
        state = checkpoint["state_dict"]
        whole = {name: state.pop(f"{key}.{name}") for name in weights.names}
    if whole is None:
        return _read_parts(key, weights, path)
    return own_parts(whole, weights)


def own_parts(whole: Mapping[str, Tensor], weights: Weights) -> list[Tensor]:
    """Returns what this process holds of a whole vector, in the order of `weights`."""
    named = zip(weights.names, weights.parameters, strict=True)
    return [_own_part(whole[name], parameter) for name, parameter in named]


def with_plain_optimizers(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Gives a checkpoint that was read whole from a folder the form of one from a file.

    Optimizer states there are called by the names of parameters, here they are numbered.
    """
    if "optimizer_0" not in checkpoint:
        return
    state = checkpoint.pop("optimizer_0")
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    number_of = {name: number for number, name in enumerate(trained)}
    checkpoint["optimizer_states"] = [
        {
            "state": {number_of[name]: value for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [number_of[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
    ]


def _as_sharded(part: Tensor, parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part.to(parameter.to_local().device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _name_of_part(key: str, name: str) -> str:
    return f"{key}.{name}.{torch.distributed.get_rank()}"


def _own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    device = torch.device(parameter.device_mesh.device_type)
    # Every process has read it all, so that none has to send.
    mesh, placements = parameter.device_mesh, parameter.placements
    return part_of(distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None))


def _read_parts(key: str, weights: Weights, path: Any) -> list[Tensor]:
    from torch.distributed.checkpoint.state_dict_loader import load

    named = zip(weights.names, weights.parameters, strict=True)
    if not isinstance(weights.parameters[0], DTensor):
        parts = {_name_of_part(key, n): torch.empty_like(p.detach()) for n, p in named}
        load({"model": parts}, checkpoint_id=path)
        return list(parts.values())
    empty = {f"{key}.{n}": _as_sharded(torch.empty_like(part_of(p.detach())), p) for n, p in named}
    load({"state_dict": empty}, checkpoint_id=path)
    return [part_of(tensor) for tensor in empty.values()]
