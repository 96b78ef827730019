"""Attacks a copy of the model every so often while it trains."""

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from patcher_pl.defenses import Defense
from patcher_pl.redteam import RedTeam
from patcher_pl.redteam.room import require_room
from patcher_pl.reports.curves import asr_figure
from patcher_pl.reports.results import BENIGN_MEASURES, Curve


class RobustnessProbe(Callback):
    """Runs a red team on a copy of the current model and logs what it finds under `robustness/`.

    The attack must be held out: its data has nothing in common with the simulated attacker's. The
    probe changes neither weights nor random state of the run. Its cost is not counted as training.
    The end of training is not probed: whoever trains measures the finished model.

    Args:
        redteam: Attacks, data, prompts and judge.
        every_n_steps: Defender steps between probes (count, >= 1).

    Raises:
        ValueError: If `every_n_steps` is below 1.
    """

    def __init__(self, redteam: RedTeam, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"RobustnessProbe.every_n_steps must be >= 1, got {every_n_steps}.")
        self.redteam = redteam
        self.every_n_steps = every_n_steps
        self._probed_at = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses prompts that are too long for the model, before any compute is spent."""
        assert isinstance(pl_module, Defense)
        require_room(self.redteam, pl_module.language_model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting at the step that was resumed."""
        self._probed_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Probes where it is due."""
        assert isinstance(pl_module, Defense)
        step = trainer.global_step
        num_due = step // self.every_n_steps - self._probed_at // self.every_n_steps
        if num_due == 0 or step == trainer.max_steps:
            return
        self._probed_at = step
        curves = self.redteam.run(
            pl_module.model,
            pl_module.tokenizer,
            pl_module.language_model.chat,
            defense=pl_module.name,
            k1=pl_module.num_attack_steps,
        )
        if isinstance(trainer.logger, TensorBoardLogger):
            log_robustness(trainer.logger, curves, step)


def log_robustness(logger: TensorBoardLogger, curves: Sequence[Curve], step: int) -> None:
    """Logs ASR after each number of attack steps, `steps_to_break`, accuracy, answers and a figure.

    With several attacks, each has its own tags. Attacks that failed before their first measurement
    are left out.
    """
    curves = [curve for curve in curves if curve.attack_steps]
    if not curves:
        return
    attacks = {curve.attack for curve in curves}
    for curve in curves:
        tag = "robustness" if len(attacks) == 1 else f"robustness_{curve.attack}"
        scalars = {f"{tag}/{key}": value for key, value in robustness_scalars(curve).items()}
        logger.log_metrics(scalars, step)
        answers = [
            f"| {sample.attack_steps} | {sample.prompt} | {sample.answer} | {sample.score} |"
            for sample in curve.samples
        ]
        table = "\n".join(
            ["| attack steps | prompt | answer | score |", "|---|---|---|---|", *answers]
        )
        logger.experiment.add_text(f"{tag}/answers", table, step)
    logger.experiment.add_figure("robustness/asr_curve", asr_figure(curves), step)


def robustness_scalars(curve: Curve) -> dict[str, float]:
    """Returns `asr_at_N`, `steps_to_break` and, before the attack, `benign_accuracy` or `_compliance`.

    A defense that was never broken gets twice the longest attack as `steps_to_break`: its line in a
    plot must rise, not end. `collapsed_at_N` is 1 where the model no longer spoke: there, neither
    low success nor that figure means safety. What was not scored is left out.
    """
    rates = zip(curve.attack_steps, curve.asr, strict=True)
    scalars = {f"asr_at_{steps}": asr for steps, asr in rates}
    broken = curve.steps_to_break
    scalars["steps_to_break"] = 2 * curve.attack_steps[-1] if broken is None else broken
    scalars |= {name: curve.at(curve.attack_steps[0], name) for name in BENIGN_MEASURES}
    # Results of earlier versions do not say; then the list is empty.
    flags = zip(curve.attack_steps, curve.collapsed, strict=False)
    scalars |= {f"collapsed_at_{steps}": float(flag) for steps, flag in flags}
    return {key: float(value) for key, value in scalars.items() if value is not None}
