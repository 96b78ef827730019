"""What the two sides of a mailbox tell each other beside tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Theta:
    """A published state of the defender.

    Args:
        life: Name of the run, or of the part since it was last resumed, that published it.
        version: Number of the publication.
        step: Defender steps taken (count).
        number: Number of the attack on it, which decides the batches of the attack.
        seed: Seed of the run's data.
        random_state: State of the generators that the attack goes on with; None lets the attack
            seed them by its number.
    """

    life: str
    version: int
    step: int
    number: int
    seed: int
    random_state: dict[str, str] | None = None

    def to_info(self) -> dict[str, Any]:
        """For `Side.publish`."""
        return asdict(self)

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "Theta":
        """Of a snapshot."""
        return cls(**info)


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attacker published about one attack.

    Args:
        theta: What was attacked.
        kind: Whether the tensors are the attacked weights or their difference to `theta`.
        losses: Mean cross-entropy before every attack step (nats per answer token).
        num_tokens: Tokens of the batch of every attack step, padding excluded.
        num_steps_from_theta: Steps since an attack began at a theta (count).
        evaluations_per_step: Gradient evaluations that a step counts as (count).
        random_state: State of the generators after the attack, where `theta` came with one.
    """

    theta: Theta
    kind: Literal["weights", "vector"]
    losses: list[float]
    num_tokens: list[int]
    num_steps_from_theta: int
    evaluations_per_step: int = 1
    random_state: dict[str, str] | None = None

    def to_info(self) -> dict[str, Any]:
        """For `Side.publish`."""
        return asdict(self)

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "Attacked":
        """Of a snapshot."""
        return cls(**{**info, "theta": Theta.from_info(info["theta"])})


@dataclass(kw_only=True)
class Spent:
    """What an attacker has done so far, over restarts of its process.

    Args:
        finished: Gradient evaluations of attacks that were published (count).
        lost: Those of attacks that were called off or died with the process (count).
        under_way: Those of the attack under way (count).
        busy_s: Seconds of attacking.
        idle_s: Seconds of waiting for something new to attack.
    """

    finished: int = 0
    lost: int = 0
    under_way: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
