"""Carried attacks in checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patcher_pl.attackers.carry import Carried, Moments
from patcher_pl.defenses.saved_tensors import add_vector, read_vector
from patcher_pl.models import Weights


def add_carried(
    checkpoint: dict[str, Any], weights: Weights, carried: Mapping[str, Carried]
) -> None:
    """Adds where attacks ended, by their kind, to a checkpoint that is about to be written."""
    described = []
    for number, (kind, one) in enumerate(carried.items()):
        key = f"carried_{number}"
        add_vector(checkpoint, key, weights, one.vector)
        entry: dict[str, Any] = {"kind": kind, "num_steps": one.num_steps}
        if one.moments is not None:
            names, counts = _moments_by_name(one.moments, weights)
            for name, tensors in names.items():
                add_vector(checkpoint, f"{key}_{name}", weights, tensors)
            entry |= {"moments": list(names), "counts": counts}
        described.append(entry)
    if described:
        checkpoint["defense"]["carried"] = described


def read_carried(checkpoint: dict[str, Any], weights: Weights, path: Any) -> dict[str, Carried]:
    """Returns what `add_carried` put into a checkpoint; see `read_vector`."""
    found = {}
    for number, entry in enumerate(checkpoint["defense"].get("carried", [])):
        key = f"carried_{number}"
        vector = read_vector(checkpoint, key, weights, path)
        assert vector is not None, f"{path} describes {key}, but does not hold it."
        moments = None
        if "moments" in entry:
            vectors = {
                name: read_vector(checkpoint, f"{key}_{name}", weights, path)
                for name in entry["moments"]
            }
            moments = Moments(
                [
                    None
                    if counts is None
                    else counts
                    | {name: tensors[at] for name, tensors in vectors.items() if tensors}
                    for at, counts in enumerate(entry["counts"])
                ]
            )
        found[entry["kind"]] = Carried(vector, entry["num_steps"], moments)
    return found


def _moments_by_name(
    moments: Moments, weights: Weights
) -> tuple[dict[str, list[Tensor]], list[dict[str, Any] | None]]:
    """Tensors like the weights, one vector each (0 where a weight has none), and all else."""
    taken = [entry for entry in moments.entries if entry is not None]
    names = [key for key, value in taken[0].items() if _is_vector(value)] if taken else []
    vectors = {
        name: [
            torch.zeros_like(tensor) if entry is None else entry[name]
            for entry, tensor in zip(moments.entries, weights.shards.tensors, strict=True)
        ]
        for name in names
    }
    counts = [
        None if entry is None else {key: value for key, value in entry.items() if key not in names}
        for entry in moments.entries
    ]
    return vectors, counts


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
