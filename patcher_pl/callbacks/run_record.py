"""What checkpoints say about the settings of their run, and what a run makes of it that goes on."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from patcher_pl.callbacks.checkpoint_files import read_entry
from patcher_pl.defenses import Defense
from patcher_pl.errors import CheckpointError
from patcher_pl.jobs.resuming import OPTIMIZER, Change, changes

_ENTRY = "run"
_OF_OPTIMIZER = f"{OPTIMIZER}.init_args."


class RunRecord(Callback):
    """Writes the settings of the run into its checkpoints; gives a resumed optimizer those of now.

    An optimizer goes on with its state and, but for this, with all settings of the checkpoint.

    The first process alone knows the contents of what settings name, and compares them.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        """See `flat_settings`; to be set before training."""
        self.history: list[dict[str, Any]] = []
        """What was changed on the way, and after which step."""
        self._changed: set[str] = set()

    def compare(self, path: Path) -> list[Change] | None:
        """Differences from the settings that a checkpoint was written with; None if it has none.

        What is taken goes into `history`, which checkpoints and results hold.

        Raises:
            CheckpointError: If one of them cannot change on the way, or the file cannot be read.
        """
        record = read_entry(path, _ENTRY)
        if not record or not record["settings"]:
            return None
        found = changes(record["settings"], self.settings)
        if refused := [f"  {change} ({change.refused})" for change in found if change.refused]:
            raise CheckpointError(
                "\n".join(
                    [
                        f"--ckpt_path {path}: these settings cannot change on the way:",
                        *refused,
                        "Change them back, give another checkpoint, or begin anew without "
                        "--ckpt_path, in another --run_dir or with --overwrite true. A trained model is "
                        "trained further by a run of its own: language_model.path takes its directory.",
                    ]
                )
            )
        self.history = list(record["history"])
        if found:
            step = read_entry(path, "global_step")
            self.history.append({"step": step, "changes": [str(change) for change in found]})
        return found

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds settings, and what was changed on the way."""
        checkpoint[_ENTRY] = {"settings": self.settings, "history": self.history}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks for changed settings of the optimizer."""
        before = (checkpoint.get(_ENTRY) or {}).get("settings")
        found = changes(before, self.settings) if before else []
        self._changed = {
            change.name.removeprefix(_OF_OPTIMIZER).split(".")[0]
            for change in found
            if change.name.startswith(_OF_OPTIMIZER)
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes them: what is restored holds those of the checkpoint."""
        assert isinstance(pl_module, Defense)
        if not self._changed:
            return
        built = pl_module.build_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # The others are the constructor's alone, and were taken by it.
                group.update({name: built[name] for name in self._changed & built.keys()})
