"""One estimate as a job: its angle to the exact one, its time and its memory."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patcher_pl.attackers import InnerProblem
from patcher_pl.errors import PatcherError
from patcher_pl.files import write_atomically
from patcher_pl.hypergradients import (
    FirstOrder,
    Hypergradient,
    HypergradientEstimate,
    OuterObjective,
    measure_trust,
)
from patcher_pl.jobs.job import FOR_MODELS, Job
from patcher_pl.losses import differentiable_loss
from patcher_pl.machine import choose_device, cpu_threads, peak_memory_gib
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.optim.clipping import inner_product
from patcher_pl.reports.ablation import EstimatorComparison
from patcher_pl.types import Batch, move_batch

REFERENCE = "exact"
# Gradients that are timed; fewer where the attack is shorter.
_NUM_TIMED = 8


@dataclass(frozen=True, kw_only=True)
class Measurement(Job[EstimatorComparison]):
    """One estimate on one attack, to be held against the exact one.

    Args:
        row: Which estimator, optimizer, length and seed.
        estimator: The estimator itself.
        language_model: The trained model, loaded anew.
        inner: The attack.
        outer_batch: Batch of the outer loss.
        trial_step: See `ComparisonGrid`.
        num_threads: CPU threads of torch (count, >= 1).
    """

    row: EstimatorComparison
    estimator: Hypergradient
    language_model: LanguageModel
    inner: InnerProblem
    outer_batch: Batch
    trial_step: float | None
    num_threads: int

    key: ClassVar[str] = "comparison"
    wants_own_process: ClassVar[bool] = True
    if_killed: ClassVar[str] = "; `longest` can leave it out"

    @property
    def is_reference(self) -> bool:
        """Whether this is the estimate that counts as exact."""
        return self.row.estimator == REFERENCE

    @property
    def exact(self) -> Path:
        """The exact hypergradient, for all estimators of the same attack."""
        return self.path.with_name("exact.safetensors")

    @property
    def is_done(self) -> bool:
        """Whether it was measured, and against what."""
        return super().is_done and self.exact.exists()

    def perform(self, device: str) -> None:
        """Measures, and writes what was found or why the estimator found nothing."""
        if not self.is_reference and not self.exact.exists():
            self.fail("there is no exact hypergradient to compare with")
            return
        try:
            with cpu_threads(self.num_threads):
                row = self._measured(choose_device(device))
        except PatcherError as error:  # One estimator's; others may do.
            self.fail(f"{type(error).__name__}: {error}")
        else:
            self.write(asdict(row))

    def fail(self, reason: str) -> None:
        self.write(asdict(replace(self.row, error=reason)))

    def parse(self, content: Mapping[str, Any]) -> EstimatorComparison:
        return EstimatorComparison(**content)

    def modules(self) -> list[str]:
        own = [__name__, "torch._decomp.decompositions_for_jvp"]
        return [*own, *FOR_MODELS, self.language_model.module_name()]

    def _measured(self, device: torch.device) -> EstimatorComparison:
        torch.manual_seed(self.row.seed)
        model: Any = self.language_model.load_model()
        model = model.to(device).train()
        weights = Weights(model)
        gradient_s = _time_gradient(model, weights, self.inner, self._outer_loss)
        memory_gib = peak_memory_gib(device)
        clock = _Clock(device)
        estimate = self.estimator.estimate(model, weights, self.inner, self._outer_loss)
        time_s = clock.elapsed_s()
        row = replace(
            self.row,
            outer_loss=estimate.outer_loss,
            gradient_evaluations=estimate.gradient_evaluations,
            time_s=time_s,
            time_in_attacks=time_s / gradient_s / self.inner.num_steps,
            memory_mib=1024 * (peak_memory_gib(device) - memory_gib),
        )
        row = _compared(row, estimate.gradients, self._exact(weights, estimate))
        if self.trial_step is None:
            return row
        return self._tried(row, model, weights, estimate)

    def _outer_loss(self, model: nn.Module) -> Tensor:
        return differentiable_loss(
            model, move_batch(self.outer_batch, next(model.parameters()).device)
        )

    def _exact(self, weights: Weights, estimate: HypergradientEstimate) -> list[Tensor]:
        """Reads the exact hypergradient, after writing it where this is the one."""
        if self.is_reference:
            pairs = zip(weights.names, estimate.gradients, strict=True)
            named = {name: gradient.contiguous() for name, gradient in pairs}
            write_atomically(self.exact, lambda temporary: save_file(named, temporary))
        exact = load_file(self.exact, str(weights.parameters[0].device))
        return [exact[name] for name in weights.names]

    def _tried(
        self,
        row: EstimatorComparison,
        model: nn.Module,
        weights: Weights,
        estimate: HypergradientEstimate,
    ) -> EstimatorComparison:
        """Steps down along the estimate, attacks again, and sees what became of the outer loss."""
        assert self.trial_step is not None
        norm = float(weights.shards.norm(estimate.gradients))
        if not norm or not math.isfinite(norm):
            return row
        length = self.trial_step * float(weights.shards.norm(weights.snapshot()))
        step = [gradient * (-length / norm) for gradient in estimate.gradients]
        with weights.shifted(step):
            trust = measure_trust(model, weights, self.inner, self._outer_loss, estimate, step)
        return replace(row, predicted_change=trust.predicted, actual_change=trust.actual)


def _time_gradient(
    model: nn.Module, weights: Weights, inner: InnerProblem, outer_loss: OuterObjective
) -> float:
    """Seconds per gradient of the attack; what is imported and allocated at first use comes before."""
    # Forward derivatives of some operations are compiled at import.
    import torch._decomp.decompositions_for_jvp  # noqa: F401

    short = replace(inner, batches=inner.batches[:_NUM_TIMED])
    FirstOrder().estimate(model, weights, short, outer_loss)
    clock = _Clock(weights.parameters[0].device)
    estimate = FirstOrder().estimate(model, weights, short, outer_loss)
    return clock.elapsed_s() / estimate.gradient_evaluations


def _compared(
    row: EstimatorComparison, estimate: Sequence[Tensor], exact: Sequence[Tensor]
) -> EstimatorComparison:
    norm, exact_norm = _norm(estimate), _norm(exact)
    difference = [one - other for one, other in zip(estimate, exact, strict=True)]
    if not exact_norm:
        return row
    return replace(
        row,
        cosine=float(inner_product(estimate, exact)) / (norm * exact_norm) if norm else None,
        relative_error=_norm(difference) / exact_norm,
        norm_ratio=norm / exact_norm,
    )


def _norm(vector: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm(vector))


class _Clock:
    """Time since it was made: of the CPU for work on the CPU, which others cannot take, else real."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def elapsed_s(self) -> float:
        return self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()
