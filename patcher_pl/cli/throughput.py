"""Times what runs of a study consist of, in a process of its own: start, gradient evaluation, measurement."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from patcher_pl.comparison.workload import Throughput
from patcher_pl.jobs import Fit, Job
from patcher_pl.machine import choose_device
from patcher_pl.reports.settings import fingerprint

# Enough for a mean, few enough for a model of billions of weights.
_NUM_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class ThroughputJob(Job[Throughput]):
    """Measures with the model and the red team of a run; the gradient evaluations are attack steps.

    Args:
        arguments: Options of that `fit`.
    """

    arguments: list[str]

    key: ClassVar[str] = "throughput"

    @classmethod
    def plan(cls, fit: Fit, path: Path) -> "ThroughputJob":
        """For the model and the red team of `fit`."""
        digest = fingerprint(["throughput", fit.digest])
        return cls(path=path, digest=digest, arguments=fit.arguments)

    def perform(self, device: str) -> None:
        """See `Job.perform`.

        Raises:
            ConfigError: If the configuration, the model or the device cannot be used.
            DataError: If prompts or data cannot be used.
        """
        began = time.monotonic()
        from patcher_pl.cli.lightning_cli import PatcherCLI
        from patcher_pl.models.context import context_length
        from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable

        cli = PatcherCLI("fit", [*self.arguments, "--run_dir", str(self.path.parent)])
        language_model, team = cli.model.language_model, cli.options.redteam
        model: Any = language_model.load_model().to(choose_device(device))
        tokenizer = language_model.load_tokenizer()
        campaign = team.campaign(
            tokenizer, language_model.chat.within(context_length(model.config))
        )
        cell = next(cell for cell in team.cells() if isinstance(cell.attack, FinetuningAttack))
        material = campaign.material(cell)
        start_s = time.monotonic() - began
        began = time.monotonic()
        campaign.examiner.examine(model, tokenizer, campaign.chat, cell.attack, material)
        measurement_s = time.monotonic() - began
        rows = material.select("all")
        batches = material.batches(cell.attack.batch_size, rows, cell.attack.asking)
        steps = cell.attack.steps(model, all_trainable(model), batches, 1 + _NUM_STEPS)
        next(steps)  # Takes longer than the others.
        began = time.monotonic()
        for _ in steps:
            pass
        evaluation_s = (time.monotonic() - began) / _NUM_STEPS
        found = Throughput(start_s=start_s, evaluation_s=evaluation_s, measurement_s=measurement_s)
        self.write(asdict(found))

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        self.write(asdict(Throughput(error=reason)))

    def parse(self, content: Mapping[str, Any]) -> Throughput:
        """See `Job.parse`."""
        return Throughput(**content)
