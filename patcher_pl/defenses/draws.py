"""Random draws of a defense that do not depend on where a run was interrupted."""

from typing import TYPE_CHECKING, Any

from patcher_pl.randomness import derive_seed

if TYPE_CHECKING:
    from patcher_pl.defenses.base import Defense


def seed_of(defense: "Defense", *names: str | int) -> int:
    """A seed by the seed of the run's data and `names`, the step for example."""
    data: Any = defense.trainer.datamodule  # type: ignore[attr-defined]
    # A rehearsal's data has none.
    return derive_seed(getattr(data, "seed", 0), *names)
