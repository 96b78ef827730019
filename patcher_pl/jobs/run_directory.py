"""Where everything of a run goes."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from patcher_pl.errors import ConfigError


@dataclass(frozen=True)
class RunDirectory:
    """The fixed layout below `--run_dir`.

    Args:
        root: The directory itself.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The complete configuration."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """What a run resumes from."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """What `tensorboard --logdir` shows."""
        return self.root / "tensorboard"

    @property
    def model(self) -> Path:
        """The hardened model, a plain Hugging Face directory."""
        return self.root / "model"

    @property
    def attackers(self) -> Path:
        """Logs of attackers that run as processes of their own."""
        return self.root / "attackers"

    @property
    def cells(self) -> Path:
        """The outcome of every attack of the red team."""
        return self.root / "cells"

    @property
    def results(self) -> Path:
        """The machine-readable outcome."""
        return self.root / "results.json"

    @property
    def control(self) -> "RunDirectory":
        """The SFT control that was trained in the same run."""
        return RunDirectory(self.root / "control")

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes the directory ready for a run.

        Raises:
            ConfigError: If an earlier run is there and may be neither resumed nor overwritten.
        """
        earlier = [path for path in self._contents() if path.exists()]
        if earlier and not resume:
            if not overwrite:
                raise ConfigError(
                    f"--run_dir {self.root} holds an earlier run ({earlier[0].name}). Go on with "
                    "--ckpt_path last, give another directory, or delete it with --overwrite true."
                )
            self.clear()
        self.root.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Deletes what a run leaves here, and nothing else."""
        for path in self._contents():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _contents(self) -> list[Path]:
        return [
            self.config,
            self.checkpoints,
            self.tensorboard,
            self.model,
            self.results,
            self.cells,
            self.attackers,
            self.control.root,
        ]
