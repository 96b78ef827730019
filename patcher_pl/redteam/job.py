"""One attack on one model as a job: what an engine runs, anywhere, and the file that is left of it."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patcher_pl.jobs.job import FOR_MODELS, Job
from patcher_pl.machine import choose_device, cpu_threads
from patcher_pl.models.context import context_length
from patcher_pl.models.language_model import LanguageModel
from patcher_pl.redteam.grid import Cell, Grid, ModelName
from patcher_pl.redteam.red_team import AttackOutcome, Campaign, RedTeam
from patcher_pl.redteam.room import require_room
from patcher_pl.redteam.transcript import judged_again, to_json
from patcher_pl.reports.results import Curve
from patcher_pl.reports.settings import as_settings, fingerprint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Bench:
    """The model on the table and the red team around it; both stay for the next attack.

    In another process it arrives empty, and loads what a job names.

    Args:
        model: What is attacked, whatever the jobs name; None loads that.
        tokenizer: Of `model`.
        mesh: Processes to spread a model over that is loaded; None loads it whole.
    """

    def __init__(
        self,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        self._given = model, tokenizer
        self._mesh = mesh
        self._seen: Any = None
        self._key: Any = None
        self._model: PreTrainedModel | None = None
        self._campaign: Campaign | None = None

    def __reduce__(self) -> Any:
        assert self._given == (None, None), "only this process has the model"
        return Bench, ()

    def clear(self) -> None:
        """Lets go of the model that was given."""
        self._given = None, None
        self._key = self._model = self._campaign = None

    def require_room(self, team: RedTeam, language_model: LanguageModel) -> None:
        """As the function of that name, for the model on the table or else the one that is named."""
        model, tokenizer = self._given
        require_room(team, language_model, None if model is None else model.config, tokenizer)

    def require_inputs(self, job: "AttackJob") -> None:
        """See `AttackJob.require_inputs`; looks once for every model and data."""
        seen = (job.language_model, job.cell.data, job.team.prompts, job.team.benign_prompts)
        if seen == self._seen:
            return
        if self._given == (None, None):
            job.language_model.load_config()
            job.language_model.load_tokenizer()
        for benchmark in (job.team.prompts, job.team.benign_prompts):
            if benchmark is not None:
                benchmark.questions()
        if job.cell.attack.uses_data:
            job.cell.data.rows()
        self._seen = seen

    def prepared(self, job: "AttackJob", device: str) -> "tuple[PreTrainedModel, Campaign]":
        """The released model on its device, and who attacks it."""
        # Attacks and seeds are the cell's business; questions and judge are the campaign's.
        team = replace(job.team, attacks=job.team.attacks[:1], seeds=[0], grid=Grid())
        key = (job.language_model, device, team)
        if self._model is None or self._campaign is None or self._key != key:
            self._model = None  # Two models may not fit.
            model, tokenizer = self._given
            language_model = job.language_model
            if model is None or tokenizer is None:
                if self._mesh is not None:
                    model = language_model.load_sharded(self._mesh)
                else:
                    place = choose_device(device)
                    model = language_model.load_model().to(place)  # type: ignore[arg-type]
                tokenizer = language_model.load_tokenizer()
            self._model = model
            chat = language_model.chat.within(context_length(model.config))
            self._campaign = team.campaign(tokenizer, chat)
            self._key = key
        return self._model, self._campaign


@dataclass(frozen=True, kw_only=True)
class AttackedModel:
    """A model that is there.

    Args:
        name: What it is called in results.
        language_model: The model.
        bench: Where it is attacked, in this process; one for all models, which may not fit beside
            each other.
        weights: Digest of its weights, where they are not those that `language_model` names.
        sibling: Another public release of it, for attacks that use one; None where none is known.
    """

    name: ModelName
    language_model: LanguageModel
    bench: Bench
    weights: str | None = None
    sibling: LanguageModel | None = None


@dataclass(frozen=True, kw_only=True)
class AttackJob(Job[Curve]):
    """A cell of a red team and the model that it is for.

    Args:
        team: Questions and judge.
        cell: The attack.
        target: The model.
        num_threads: CPU threads of torch; None leaves it to torch.
    """

    team: RedTeam
    cell: Cell
    target: AttackedModel
    num_threads: int | None = None

    key: ClassVar[str] = "curve"

    @classmethod
    def plan(
        cls,
        team: RedTeam,
        cell: Cell,
        target: AttackedModel,
        directory: Path,
        num_threads: int | None = None,
    ) -> "AttackJob":
        """The job of a cell, its file below `directory`."""
        settings = {
            # Which other cells there are does not matter to this one.
            "team": replace(
                team, attacks=[cell.attack], data=cell.data, seeds=[cell.seed], grid=Grid()
            ),
            "varied": cell.varied,
            "subject": target.name,
            "language_model": target.language_model,
            "weights": target.weights,
        }
        if cell.attack.uses_sibling:
            settings["sibling"] = target.sibling
        digest = fingerprint(as_settings(settings, for_outcome=True))
        # Templates make long names, and file systems take 255 bytes.
        file = f"{_slug(cell.name)[:100]}-seed-{cell.seed}-{digest[:8]}.json"
        name = target.name
        return cls(
            path=directory / _slug(f"{name.defense} {name.k1 or ''}") / file,
            digest=digest,
            team=team,
            cell=cell,
            target=target,
            num_threads=num_threads,
        )

    def perform(self, device: str) -> None:
        """Attacks, or only judges what an earlier attack has left unjudged, and writes the curve.

        Raises:
            DataError: If prompts or data cannot be used.
            ConfigError: If the model, the device or the judge cannot be used.
        """
        with cpu_threads(self.num_threads):
            kept = self._unjudged
            outcome = self.attacked(device) if kept is None else self._judged_again(kept)
        record = outcome.record
        is_judged = record is None or not record.num_unjudged or outcome.curve.error is not None
        # With no verdict missing, answers are not kept: they may be harmful, and are many.
        beside = {} if is_judged or record is None else {"unjudged": to_json(record)}
        self.write(asdict(outcome.curve), **beside)
        if outcome.judge_failure is not None:
            raise outcome.judge_failure

    def attacked(self, device: str) -> AttackOutcome:
        """Attacks, and writes nothing; what `perform` does, and with it all who hold the model."""
        model, campaign = self.target.bench.prepared(self, device)
        return campaign.attack(model, self.cell, self.target.name, self.target.sibling)

    def require_inputs(self) -> None:
        """Looks whether this process can read what the attack needs, but for the weights.

        Raises:
            PatcherError: If it cannot.
        """
        self.target.bench.require_inputs(self)

    @property
    def needs_model(self) -> bool:
        """Whether there is more to do than to judge answers that are kept."""
        return self._unjudged is None

    def on(self, bench: Bench) -> "AttackJob":
        """The same job with another bench."""
        return replace(self, target=replace(self.target, bench=bench))

    def _judged_again(self, kept: list[dict[str, Any]]) -> AttackOutcome:
        cell, name = self.cell, self.target.name
        logger.info("%s under %s, seed %d: judged again", name.defense, cell.name, cell.seed)
        record = judged_again(self.team, kept)
        curve = record.curve(name.key(cell), None, family=cell.family, varied=cell.varied)
        if (earlier := self.load()) is not None:
            curve = replace(
                curve,
                num_trained_rows=earlier.num_trained_rows,
                trained_poison_ratio=earlier.trained_poison_ratio,
                skipped_steps=earlier.skipped_steps,
            )
        for concern in record.concerns():
            logger.warning("%s, seed %d: %s.", cell.name, cell.seed, concern)
        return AttackOutcome(curve, record)

    @property
    def _unjudged(self) -> list[dict[str, Any]] | None:
        """What a finished attack has left unjudged; None where there is nothing."""
        content = self.read()
        return None if content is None else content.get("unjudged")

    @property
    def is_done(self) -> bool:
        """Whether it ran to its end, and every answer has its verdict.

        Curves of earlier versions have no answers: those that cannot be trusted are attacked again.
        """
        outcome = self.load()
        is_whole = outcome is not None and outcome.error is None and outcome.trusted
        return is_whole and self._unjudged is None

    def parse(self, content: Mapping[str, Any]) -> Curve:
        return replace(
            Curve.from_json(content),
            # No part of the digest: it changes what is made of a curve, not the curve.
            min_benign_kept=self.team.min_benign_kept,
            from_scratch=self.language_model.from_scratch_seed is not None,
        )

    def fail(self, reason: str) -> None:
        """Writes why there is no curve; what was measured before is lost with the process.

        A failure to judge again leaves the answers where they are.
        """
        if self._unjudged is not None:
            return
        defense, k1, train_seed, attack, seed = self.target.name.key(self.cell)
        curve = Curve(
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
        self.write(asdict(curve))

    def modules(self) -> list[str]:
        return [__name__, *FOR_MODELS, self.target.language_model.module_name()]

    @property
    def language_model(self) -> LanguageModel:
        """The model."""
        return self.target.language_model


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=]+", "-", name).strip("-")
