"""The interface of a trajectory store: how the way back knows where the way forward was."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from patcher_pl.hypergradients.attack_run import AttackRun, Point
from patcher_pl.hypergradients.trajectories.shelf import Device, Shelf


@dataclass(frozen=True, kw_only=True)
class TrajectoryStore(ABC):
    """Settings of a store; what it keeps lies on a shelf.

    P stands for the memory of the parameters below; a state is 3 P with AdamW, 2 P with momentum
    and P with plain gradient descent.

    Args:
        device: Where tensors are kept: `model` beside the model, `cpu` in host memory, `disk` in
            files of a temporary folder.
        directory: Where that folder is made; None for the system's place.

    Raises:
        ValueError: If there is no such device.
    """

    device: Device = "model"
    directory: str | None = None

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise ValueError(
                f"{type(self).__name__}.device must be model, cpu or disk, got {self.device!r}. "
                "Use cpu where the trajectory does not fit beside the model."
            )

    def shelf(self) -> Shelf:
        """Returns an empty shelf."""
        return Shelf(self.device, self.directory)

    @abstractmethod
    def record(self, run: AttackRun, shelf: Shelf) -> None:
        """Runs the attack to its end, from where it is, and keeps what the way back needs."""

    @abstractmethod
    def walk_back(
        self, run: AttackRun, shelf: Shelf, first: int
    ) -> Iterator[Sequence[Tensor | None]]:
        """Yields the gradient of every step from the last one to `first`.

        While one is looked at, `run` is at that step: parameters, moments and random numbers are
        those from which the step was taken.

        Args:
            run: The attack.
            shelf: As `record` left it.
            first: Step from which `record` was called.
        """


def keep(shelf: Shelf, run: AttackRun) -> None:
    """Keeps where the attack is."""
    point = run.point()
    shelf.put(("state", point.position), point.tensors)
    shelf.steps[point.position] = point.steps


def put_back(shelf: Shelf, run: AttackRun, position: int, *, forget: bool = True) -> None:
    """Puts the attack to a place that was kept."""
    key = ("state", position)
    # Forgotten on the last visit, so that the shelf never holds more than the store promises.
    tensors = shelf.take(key) if forget else shelf.read(key)
    run.go_to(Point(position, [t for t in tensors if t is not None], shelf.steps[position]))
