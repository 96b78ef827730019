"""Packed batches: whether defense and model can take them."""

from typing import TYPE_CHECKING

from patcher_pl.errors import ConfigError
from patcher_pl.models.packing import require_packing
from patcher_pl.models.shards import Shards

if TYPE_CHECKING:
    from lightning import Trainer

    from patcher_pl.defenses.base import Defense

SETTING = "data.packing"


def require_packable(defense: "Defense", trainer: "Trainer") -> None:
    """Refuses packed batches that defense or model would get wrong, before any compute is spent.

    Raises:
        ConfigError: If the data is packed and that would be so.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not getattr(data, "packing", False):
        return
    if not defense.supports_packing:
        raise ConfigError(
            f"{SETTING}: {type(defense).__name__} reads padded batches row by row. Set it to false."
        )
    device = Shards(defense.model, list(defense.model.parameters())).device
    with trainer.precision_plugin.forward_context():
        require_packing(
            defense.model, [one.input_ids for one in data.safe_examples[:2]], device, SETTING
        )
