"""Where tensors of a trajectory wait: beside the model, in host memory, or on disk."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

Device = Literal["model", "cpu", "disk"]
Tensors = Sequence[Tensor | None]


class Shelf:
    """Keeps lists of tensors under keys until they are taken back; a context manager.

    Args:
        device: `model` keeps tensors where they are, `cpu` in host memory, `disk` in files of a
            temporary folder that is removed at the end.
        directory: Where that folder is made; None for the system's place.
    """

    def __init__(self, device: Device, directory: str | None = None) -> None:
        self.steps: dict[int, Sequence[int]] = {}  # Steps of each parameter, by position.
        self._device = device
        self._directory = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._entries: dict[tuple[str, int], Any] = {}
        self._places: dict[tuple[str, int], torch.device] = {}

    def __enter__(self) -> Self:
        if self._device == "disk":
            self._folder = tempfile.TemporaryDirectory("-trajectory", dir=self._directory)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entries.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._entries

    def put(self, key: tuple[str, int], tensors: Tensors, *, copy: bool = True) -> None:
        """Keeps tensors.

        Args:
            key: Kind of entry and step.
            tensors: What to keep.
            copy: Set to False for tensors that nobody will change.
        """
        self._places[key] = next((t.device for t in tensors if t is not None), torch.device("cpu"))
        if self._folder is not None:
            path = Path(self._folder.name, f"{key[0]}-{key[1]}.pt")
            # Through the CPU: a file of GPU tensors would come back to whatever device has that
            # number.
            torch.save([None if t is None else t.detach().cpu() for t in tensors], path)
            self._entries[key] = path
            return
        to_host = self._device == "cpu"
        self._entries[key] = [
            t if t is None else t.detach().to("cpu" if to_host else t.device, copy=copy)
            for t in tensors
        ]

    def take(self, key: tuple[str, int]) -> list[Tensor | None]:
        """Returns what was kept, to where it came from, and forgets it."""
        found, place = self._entries.pop(key), self._places.pop(key)
        if isinstance(found, Path):
            path, found = found, torch.load(found, weights_only=True)
            path.unlink()
        return [None if tensor is None else tensor.to(place) for tensor in found]

    def read(self, key: tuple[str, int]) -> list[Tensor | None]:
        """Returns what was kept, and keeps it; not to be changed."""
        found, place = self._entries[key], self._places[key]
        if isinstance(found, Path):
            found = torch.load(found, weights_only=True)
        return [None if tensor is None else tensor.to(place) for tensor in found]
