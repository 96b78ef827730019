"""Times what runs of a study consist of, in a process of its own: start, gradient evaluation, measurement."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from patcher_pl.comparison.workload import Throughput
from patcher_pl.jobs import Fit, Job
from patcher_pl.machine import choose_device, cpu_threads
from patcher_pl.quiet import quiet_libraries
from patcher_pl.reports.settings import fingerprint

# Enough for a mean, few enough for a model of billions of weights.
_NUM_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class ThroughputJob(Job[Throughput]):
    """Measures with the model and the red team of a run; the gradient evaluations are attack steps.

    Args:
        arguments: Options of that `fit`.
        num_threads: CPU threads, unless that `fit` says; None leaves them to torch.
    """

    arguments: list[str]
    num_threads: int | None = None

    key: ClassVar[str] = "throughput"

    @classmethod
    def plan(cls, fit: Fit, path: Path, num_threads: int | None) -> "ThroughputJob":
        """For the model and the red team of `fit`."""
        digest = fingerprint(["throughput", fit.digest])
        return cls(path=path, digest=digest, arguments=fit.arguments, num_threads=num_threads)

    def perform(self, device: str) -> None:
        """See `Job.perform`.

        Raises:
            ConfigError: If the configuration, the model or the device cannot be used.
            DataError: If prompts or data cannot be used.
        """
        began = time.monotonic()
        from patcher_pl.cli.lightning_cli import PatcherCLI

        quiet_libraries()
        arguments = [*self.arguments, "--run_dir", str(self.path.parent)]
        with _without_notices():
            cli = PatcherCLI("fit", arguments)
        threads = cli.options.num_threads
        with cpu_threads(self.num_threads if threads is None else threads):
            self.write(asdict(_measured(cli, device, began)))

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        self.write(asdict(Throughput(error=reason)))

    def parse(self, content: Mapping[str, Any]) -> Throughput:
        """See `Job.parse`."""
        return Throughput(**content)


def _measured(cli: Any, device: str, began: float) -> Throughput:
    from patcher_pl.models.context import context_length
    from patcher_pl.redteam.finetuning import FinetuningAttack, all_trainable

    language_model, team = cli.model.language_model, cli.options.redteam
    model: Any = language_model.load_model().to(choose_device(device))
    tokenizer = language_model.load_tokenizer()
    campaign = team.campaign(tokenizer, language_model.chat.within(context_length(model.config)))
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
    times = [time.monotonic()]
    times += [time.monotonic() for _ in steps]
    # The median: others may use the machine for a moment.
    evaluation_s = median(after - before for before, after in pairwise(times))
    return Throughput(start_s=start_s, evaluation_s=evaluation_s, measurement_s=measurement_s)


@contextmanager
def _without_notices() -> Iterator[None]:
    """No lines of Lightning on seeds and devices, which are for those who train."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
