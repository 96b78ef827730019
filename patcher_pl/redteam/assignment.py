"""One cell against one model: what an engine runs, anywhere, and the file that is left of it."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.devices import choose_device
from patcher_pl.errors import PatcherError
from patcher_pl.files import write_json
from patcher_pl.models.language_model import LanguageModel
from patcher_pl.redteam.campaign import Campaign, Subject
from patcher_pl.redteam.grid import Cell, Grid
from patcher_pl.redteam.red_team import RedTeam
from patcher_pl.reports.results import Curve
from patcher_pl.reports.settings import as_settings, fingerprint
from patcher_pl.shipped import resolve_model
from patcher_pl.threads import cpu_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A cell, its model, and where the outcome is kept.

    Args:
        team: Questions and judge.
        cell: The attack.
        subject: Name of the model in results.
        language_model: The model.
        path: File of the outcome; whole or absent.
        digest: Of everything that the outcome depends on.
        num_threads: CPU threads of torch; None leaves it to torch.
    """

    team: RedTeam
    cell: Cell
    subject: Subject
    language_model: LanguageModel
    path: Path
    digest: str
    num_threads: int | None

    @classmethod
    def plan(
        cls,
        team: RedTeam,
        cell: Cell,
        subject: Subject,
        language_model: LanguageModel,
        weights: Any,
        directory: Path,
        num_threads: int | None,
    ) -> "Assignment":
        """The assignment, its file below `directory`.

        Args:
            team: Questions and judge.
            cell: The attack.
            subject: Name of the model in results.
            language_model: The model.
            weights: What tells its weights from others at the same place.
            directory: Where the cells of a run are kept.
            num_threads: CPU threads of torch; None leaves it to torch.
        """
        # Which other cells there are does not matter to this one.
        settings = {
            "team": replace(
                team, attacks=[cell.attack], data=cell.data, seeds=[cell.seed], grid=Grid()
            ),
            "varied": cell.varied,
            "subject": subject,
            "language_model": language_model,
            "weights": weights,
        }
        digest = fingerprint(as_settings(settings, for_outcome=True))
        # Templates make long names, and file systems take 255 bytes.
        name = f"{_slug(cell.name)[:100]}-seed-{cell.seed}-{digest[:8]}"
        return cls(
            team=team,
            cell=cell,
            subject=subject,
            language_model=language_model,
            path=directory / _slug(f"{subject.defense} {subject.k1 or ''}") / f"{name}.json",
            digest=digest,
            num_threads=num_threads,
        )

    def load(self) -> Curve | None:
        """The outcome, failures included; None where there is none of these settings."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["fingerprint"] != self.digest:
                return None
            return Curve.from_json(content["curve"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise PatcherError(
                f"{self.path}: this is no outcome of an attack ({error}). Delete it and go on with "
                "the same command."
            ) from error

    @property
    def is_done(self) -> bool:
        """Whether it ran to its end; what failed is tried again."""
        curve = self.load()
        return curve is not None and curve.error is None

    def save(self, curve: Curve) -> None:
        """Writes the outcome."""
        write_json(self.path, {"fingerprint": self.digest, "curve": asdict(curve)})

    def fail(self, reason: str) -> None:
        """Writes why there is no outcome; what was measured before is lost with the process."""
        defense, k1, train_seed, attack, seed = self.subject.key(self.cell)
        self.save(
            Curve(
                defense=defense,
                seed=seed,
                k1=k1,
                attack=attack,
                attack_steps=[],
                asr=[],
                benign_accuracy=[],
                steps_to_break=None,
                threshold=self.team.threshold,
                train_seed=train_seed,
                error=reason,
                family=self.cell.family,
                varied=dict(self.cell.varied),
            )
        )

    def perform(self, device: str, bench: "Bench | None" = None) -> None:
        """Attacks and writes the outcome.

        Args:
            device: `cpu`, `cuda:1`, `auto`, ...
            bench: Keeps the model for the next assignment; None loads it for this one alone.

        Raises:
            DataError: If prompts or data cannot be used.
            ConfigError: If the model or the device cannot be used.
        """
        with cpu_threads(self.num_threads):
            model, campaign = (bench or Bench()).prepared(self, device)
            self.save(campaign.run(model, self.cell, self.subject))


class Bench:
    """The model on the table and the red team around it; changed only where the next one differs."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: PreTrainedModel | None = None
        self._campaign: Campaign | None = None

    def prepared(self, assignment: Assignment, device: str) -> "tuple[PreTrainedModel, Campaign]":
        """The released model on its device, and who attacks it."""
        # Attacks and seeds are the cell's business; questions and judge are the campaign's.
        team = replace(assignment.team, attacks=assignment.team.attacks[:1], seeds=[0])
        key = (assignment.language_model, device, team)
        if self._model is None or self._campaign is None or self._key != key:
            self._model = None  # Two models may not fit.
            language_model = assignment.language_model
            place = choose_device(device)
            self._model = language_model.load_model().to(place)  # type: ignore[arg-type]
            self._campaign = team.campaign(language_model.load_tokenizer(), language_model.chat)
            self._key = key
        return self._model, self._campaign


def located(language_model: LanguageModel) -> Path:
    """Where the weights of a local model are; a folder that is not there for a hub id."""
    return Path(resolve_model(language_model.path))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=]+", "-", name).strip("-")
