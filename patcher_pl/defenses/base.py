"""What every defense shares: manual optimization that behaves as a Lightning user expects."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from patcher_pl.defenses.cost import Cost
from patcher_pl.errors import CheckpointError, ConfigError, PatcherError
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel
from patcher_pl.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Defense(LightningModule):
    """Trains a language model by some gradient; subclasses say which.

    One defender step is one step of the one optimizer that Lightning counts, so `max_steps`, logging
    and checkpoint intervals mean defender steps. Clipping and accumulation are settings of the
    defense, since Lightning leaves them to the module under manual optimization. Accumulation runs
    on across epochs: every step uses exactly `accumulate_grad_batches` batches.

    Args:
        language_model: The model to harden; loaded in `configure_model`.
        optimizer: Builds the defender's optimizer from its parameters.
        scheduler: Builds a learning-rate schedule from the optimizer; stepped once per defender
            step. None keeps the rate constant.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        max_grad_norm: float | None,
        accumulate_grad_batches: int,
    ) -> None:
        super().__init__()
        self._require(
            max_grad_norm is None or max_grad_norm > 0,
            "max_grad_norm",
            "> 0 or null",
            max_grad_norm,
            "Use null to leave gradients as they are.",
        )
        self._require(
            accumulate_grad_batches >= 1,
            "accumulate_grad_batches",
            ">= 1",
            accumulate_grad_batches,
            "Use 1 to take a step after every batch.",
        )
        self.automatic_optimization = False
        self.language_model = language_model
        self.build_optimizer = optimizer
        self.build_scheduler = scheduler
        self.max_grad_norm = max_grad_norm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.cost = Cost()
        self.stop_requested = False
        self._num_accumulated = 0
        self._losses: dict[str, Tensor] = {}
        self._restored_random_state: dict[str, Tensor] = {}
        self._model: PreTrainedModel | None = None

    @abstractmethod
    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds `share` times the gradient of the defense's loss on `batch` to every `.grad`.

        Returns:
            Losses to log under `train/`, unscaled.
        """

    def before_step(self) -> None:
        """Called before the first batch of every defender step; Patcher attacks here."""

    @property
    def name(self) -> str:
        """Name of the defense in results and TensorBoard."""
        return type(self).__name__.lower()

    @property
    def num_attack_steps(self) -> int | None:
        """Steps of the simulated attack (k1), None for defenses without one."""
        return None

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradient is accumulated: what a checkpoint holds is then all there is."""
        return self._num_accumulated == 0

    @property
    def model(self) -> "PreTrainedModel":
        """The live model."""
        if self._model is None:
            raise RuntimeError("The model is loaded in configure_model, which has not run yet.")
        return self._model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that belongs to the model."""
        return self.language_model.load_tokenizer()

    def configure_model(self) -> None:
        """Loads the weights, once."""
        if self._model is None:
            self._model = self.language_model.load_model()

    def configure_optimizers(self) -> Any:
        """Builds optimizer and schedule over what is trainable."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = self.build_optimizer(trainable)
        if self.build_scheduler is None:
            return optimizer
        scheduler = self.build_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                f"{type(self).__name__}.scheduler must depend on the step alone, got "
                "ReduceLROnPlateau. Use a schedule such as CosineAnnealingLR."
            )
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Refuses what this version cannot do right, before any compute is spent."""
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"trainer.devices: {type(self).__name__} trains on one device, got "
                f"{self.trainer.world_size}. Set `trainer.devices: 1`."
            )
        if "16" in self.trainer.precision and not self.trainer.precision.startswith("bf16"):
            raise ConfigError(
                f"trainer.precision: {self.trainer.precision!r} needs loss scaling, which the two "
                "backward passes of a defender step do not support. Use `bf16-mixed` or `32-true`."
            )
        self.model.train()

    def on_train_start(self) -> None:
        """Begins between two steps, with the random state of the run that is resumed."""
        self.model.zero_grad(set_to_none=True)
        self._num_accumulated = 0
        self._losses = {}
        if self._restored_random_state:
            torch.set_rng_state(self._restored_random_state["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in self._restored_random_state:
                torch.cuda.set_rng_state(self._restored_random_state["cuda"].cpu(), self.device)
            self._restored_random_state = {}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Takes one batch; every `accumulate_grad_batches`-th one ends a defender step."""
        if self._num_accumulated == 0:
            self.before_step()
        share = 1 / self.accumulate_grad_batches
        for key, value in self.add_gradients(batch, share).items():
            self._losses[key] = self._losses.get(key, 0) + share * value
        self._num_accumulated += 1
        if self._num_accumulated == self.accumulate_grad_batches:
            losses, self._losses = self._losses, {}
            self._num_accumulated = 0
            self._log_step({**losses, **self._take_step()})

    def _take_step(self) -> dict[str, Any]:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(grad_norm):
            raise PatcherError(
                f"{type(self).__name__} diverged at defender step {self.global_step} (gradient norm "
                f"{float(grad_norm)}); the weights were not touched. Lower the learning rate of "
                "model.init_args.optimizer, or go on from an earlier checkpoint."
            )
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedulers = self.lr_schedulers()
        if schedulers is not None:
            schedulers.step()  # type: ignore[union-attr]
        return {"grad_norm": grad_norm, "lr": lr}

    def _log_step(self, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            shown = key in ("loss_safe", "attack_gap")
            self.log(f"train/{key}", value, prog_bar=shown, logger=False)
        # Straight to the loggers: Lightning's own steps there are batches, not defender steps.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and self.global_step % every == 0:
            values = {f"train/{key}": float(value) for key, value in metrics.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)

    def backward_of(self, loss: Tensor, batch: Batch) -> None:
        """Backward pass of a scaled loss, counted as one gradient evaluation."""
        self.manual_backward(loss)
        self.cost.add(num_tokens=int(batch["attention_mask"].sum()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss on held-out conversations."""
        self._log_held_out("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss on held-out conversations."""
        self._log_held_out("test", batch)

    def _log_held_out(self, stage: str, batch: Batch) -> None:
        loss = causal_lm_loss(self.model, batch)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        if self.trainer.state.fn == "fit":
            # Lightning takes this as the place on the logger's axis, instead of counting batches.
            step = float(self.global_step)
            self.log("step", step, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters and the random state of the run."""
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["defense"] = {
            "class": type(self).__name__,
            "cost": self.cost.state(),
            "random_state": random_state,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the counters and the random state of the run.

        Raises:
            CheckpointError: If the checkpoint is not one of this defense.
        """
        state = checkpoint.get("defense", {})
        own, writer = type(self).__name__, state.get("class", "another program")
        if writer != own:
            raise CheckpointError(
                f"The checkpoint was written by {writer}, so {own} cannot go on from it. Give "
                f"--ckpt_path a checkpoint of {own}, or leave it away to start from the beginning."
            )
        self.cost = Cost(**state["cost"])
        self._restored_random_state = state["random_state"]

    def _require(self, holds: bool, field: str, rule: str, value: object, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{field} must be {rule}, got {value}. {remedy}")
