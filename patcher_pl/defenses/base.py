"""What every defense shares: manual optimization that behaves as a Lightning user expects."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from patcher_pl.defenses.attack_source import AttackSource
from patcher_pl.defenses.extrapolation import LowRankExtrapolation
from patcher_pl.defenses.optimizing import StepCheck, build_optimizer, build_scheduler
from patcher_pl.defenses.saved_tensors import with_plain_optimizers
from patcher_pl.defenses.step import Cost, Step
from patcher_pl.defenses.strategies import (
    OneDevice,
    over_processes,
    require_packable,
    require_readable,
    require_supported,
    shared_out,
    uses_fsdp1,
)
from patcher_pl.errors import ConfigError, PatcherError, RunInterrupted
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.models.blocks import blocks_of
from patcher_pl.randomness import collect_generators, restore_generators
from patcher_pl.types import Batch, count_conversations, count_tokens
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Defense(LightningModule):
    """Trains a language model by some gradient; subclasses say which.

    One defender step is one step of the one optimizer that Lightning counts, so `max_steps`, logging
    and checkpoint intervals mean defender steps. Clipping and accumulation are settings of the
    defense, since Lightning leaves them to the module under manual optimization. Accumulation runs
    on across epochs: every step uses exactly `accumulate_grad_batches` batches.

    With `ModelParallelStrategy` (FSDP2) or `FSDPStrategy` (FSDP1) the model is sharded, and every
    process takes its own batch of each step. A step is then the same as one process takes on all
    these batches together. `one_device` says of a defense that it cannot do that.

    Needs are declared in the class attributes below. A defense that simulates an attack sets
    `attack_source` in its constructor, which sees to when, by whom, and to checkpoints.

    Args:
        language_model: The model to harden; loaded in `configure_model`.
        optimizer: Builds the optimizer from the parameters; AdamW with lr 1e-5 unless given, the rate
            of the Patcher paper, which trains every weight.
        scheduler: Builds a learning-rate schedule from the optimizer; stepped once per defender
            step. None keeps the rate constant.
        max_grad_norm: Global gradient norm to clip to; None leaves gradients as they are. 1 is the
            Patcher paper's, and what the Trainer of transformers clips to.
        accumulate_grad_batches: Batches whose mean loss makes one step (count, >= 1).
        extrapolation: Go on from the trained weights before they are exported (LoX); None does not.

    Raises:
        ValueError: If a value is out of its range.
    """

    supports_packing: bool = False
    """Whether packed batches (see `Batch`) mean the same to it as padded ones."""

    short_name: ClassVar[str | None] = None
    """Its name in results; None takes the class's in small letters."""

    one_device: ClassVar[OneDevice | None] = None
    """Why it cannot be trained on sharded weights, and what can; None where it can."""

    needs_attack_data: ClassVar[bool] = False
    """Whether it trains on harmful conversations, beyond those of an `attack_source`."""

    reads_layers: ClassVar[bool] = False
    """Whether it looks into the decoder layers of the model (`blocks`)."""

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        accumulate_grad_batches: int = 1,
        extrapolation: LowRankExtrapolation | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.language_model = language_model
        self.build_optimizer = optimizer
        self.build_scheduler = scheduler
        self.max_grad_norm = max_grad_norm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.extrapolation = extrapolation
        rule, remedy = "> 0 or null", "Use null to leave gradients as they are."
        require(self, max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", rule, remedy)
        remedy = "Use 1 to take a step after every batch."
        require(self, accumulate_grad_batches >= 1, "accumulate_grad_batches", ">= 1", remedy)
        self.attack_source: AttackSource | None = None
        self.cost, self.stop_requested, self._num_accumulated = Cost(), False, 0
        self.step_check = StepCheck(type(self).__name__)
        self._losses: dict[str, Tensor] = {}
        self._restored_random_states: list[dict[str, Tensor]] = []
        self._model: PreTrainedModel | None = None
        self._step: Step | None = None

    @abstractmethod
    def add_gradients(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Adds `share` times the gradient of the defense's loss on `batch` to every `.grad`.

        Returns:
            Losses to log under `train/`, unscaled.
        """

    def before_step(self) -> None:
        """Called before the first batch of every defender step; attacks where that is due."""
        if self.attack_source is not None:
            self.attack_source.prepare(self.step)

    @property
    def name(self) -> str:
        """Name of the defense in results and TensorBoard."""
        kind = self.short_name or type(self).__name__.lower()
        return kind if self.extrapolation is None else f"{kind}_lox"

    @property
    def num_attack_steps(self) -> int | None:
        """Steps of the simulated attack (k1), None for defenses without one."""
        return None if self.attack_source is None else self.attack_source.attacker.num_steps

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

    @property
    def step(self) -> Step:
        """The step under way; what helpers get in place of the defense."""
        assert self._step is not None, "There is a step in training only."
        return self._step

    @cached_property
    def all_weights(self) -> Weights:
        """Owner of every weight of the model, those under adapters too; an attacker gets these."""
        return Weights(self.model, self.language_model.weight_copies_on)

    @cached_property
    def trained_weights(self) -> Weights:
        """Owner of what is trained: every weight, or the adapters."""
        if self.language_model.lora is None:
            return self.all_weights  # One owner: two would not know of each other's shifts.
        return Weights(self.model, self.language_model.weight_copies_on, trained_only=True)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers of the model."""
        return blocks_of(self.model)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that belongs to the model."""
        return self.language_model.load_tokenizer()

    def configure_model(self) -> None:
        """Loads the weights, once; shards them where the strategy does.

        Raises:
            ConfigError: If this defense cannot be trained with the trainer's strategy.
        """
        if self._model is not None:
            return
        if self._trainer is not None:
            require_supported(self, self.trainer)
        mesh = self.device_mesh
        if mesh is not None:
            self._model = self.language_model.load_sharded(mesh["data_parallel"])
            return
        self._model = self.language_model.load_model()
        if self._trainer is not None:
            self._model = shared_out(self._model, self.language_model.sharding, self.trainer)

    def release(self) -> None:
        """Lets go of the weights, to make room; the defense is of no use to train afterwards."""
        self._model = self._step = None
        for name in ("all_weights", "trained_weights", "blocks"):
            self.__dict__.pop(name, None)
        if self.attack_source is not None:
            self.attack_source.release()

    def to(self, *args: Any, **kwargs: Any) -> "Defense":  # type: ignore[override]
        """Moves the module; one whose shards wait in host memory stays there."""
        if self.device_mesh is not None and self.language_model.sharding.cpu_offload:
            return self
        return super().to(*args, **kwargs)  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        """Builds optimizer and schedule over what is trainable."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        owner = type(self).__name__
        optimizer = build_optimizer(owner, self.model, trainable, self.build_optimizer)
        if self.build_scheduler is None:
            return optimizer
        return [optimizer], [build_scheduler(owner, optimizer, self.build_scheduler)]

    def on_fit_start(self) -> None:
        """Refuses what this version cannot do right, before any compute is spent."""
        require_supported(self, self.trainer)
        require_packable(self, self.trainer)
        has_attack = getattr(self.trainer.datamodule, "has_attack", False)  # type: ignore[attr-defined]
        if (self.needs_attack_data or self.attack_source is not None) and not has_attack:
            raise ConfigError(
                f"SafetyDataModule.attack: {type(self).__name__} trains on, or against, harmful "
                "conversations, got none. Set `data.attack`, or use SFT."
            )
        if self.reads_layers:
            _ = self.blocks
        self.model.train()

    def on_train_start(self) -> None:
        """Begins between two steps, with the random state of the run that is resumed."""
        self.optimizers().zero_grad(set_to_none=True)  # type: ignore[union-attr]
        self._num_accumulated, self._losses = 0, {}
        restored, self._restored_random_states = self._restored_random_states, []
        if self.global_rank < len(restored):
            restore_generators(restored[self.global_rank], self.device)
        elif self.global_rank > 0:
            # Lightning gives all processes one seed; each needs its own dropout.
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        self._step = self._begin_step()
        if self.attack_source is not None:
            self.attack_source.open(self.step)

    def on_train_end(self) -> None:
        """Lets attackers elsewhere know that they are no longer needed."""
        if self.attack_source is not None:
            self.attack_source.close()

    def stop_is_agreed(self) -> bool:
        """Whether any process was asked to stop; all of them ask, and get the same answer."""
        return self.trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)

    def check_for_stop(self) -> None:
        """Ends the run here if any process was asked to stop; all of them ask at the same places."""
        if self.stop_is_agreed():
            raise RunInterrupted("Stopped during a simulated attack.")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Takes one batch; every `accumulate_grad_batches`-th one ends a defender step."""
        if self._num_accumulated == 0:
            self._step = self._begin_step()
        # All that can be taken back lies within; the optimizer's step cannot.
        with self.step.undoable():
            if self._num_accumulated == 0:
                self.before_step()
            share = 1 / self.accumulate_grad_batches
            for key, value in self.add_gradients(batch, share).items():
                self._losses[key] = self._losses.get(key, 0) + share * value
        self._num_accumulated += 1
        if self._num_accumulated == self.accumulate_grad_batches:
            # Reduced once per step, not per batch: every reduction waits for the slowest process.
            losses, self._losses = over_processes(self.trainer, self._losses), {}
            self._num_accumulated, source, take = 0, self.attack_source, self._take_step
            taken = take() if source is None else source.finish(self.step, take)
            self._log_step({**losses, **taken})

    def _begin_step(self) -> Step:
        step = Step(
            owner=type(self).__name__,
            number=self.global_step,
            model=self.model,
            all_weights=self.all_weights,
            trained_weights=self.trained_weights,
            device=self.device,
            data=self.trainer.datamodule,  # type: ignore[attr-defined]
            loader=self.trainer.train_dataloader,
            cost=self.cost,
            backward=self.backward_of,
            log=self.log_now,
            check_for_stop=self.check_for_stop,
        )
        step.on_undo(self._forget_batches)
        return step

    def _forget_batches(self) -> None:
        """Hands out the batches of this step again, and drops what they had added."""
        self.trainer.train_dataloader.rewind(self._num_accumulated + 1)  # type: ignore[union-attr]
        self.optimizers().zero_grad(set_to_none=True)  # type: ignore[union-attr]
        self._num_accumulated, self._losses = 0, {}

    def _take_step(self) -> dict[str, Any]:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        self.trained_weights.shards.average_gradients()
        grad_norm = self.trained_weights.shards.clip_gradients(limit)
        if not torch.isfinite(grad_norm):
            raise PatcherError(
                f"{type(self).__name__} diverged at defender step {self.global_step} (gradient norm "
                f"{float(grad_norm)}); the weights were not touched. Lower the learning rate of "
                "model.init_args.optimizer, or go on from an earlier checkpoint."
            )
        lr = float(optimizer.param_groups[0]["lr"])  # A tensor would go on with the schedule.
        self.step_check.before(self.trained_weights.parameters, optimizer)
        optimizer.step()
        self.step_check.after(self.trained_weights.shards.reduction)
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

    def log_now(self, metrics: Mapping[str, float], at: int | None = None) -> None:
        """Logs at the defender step, or elsewhere; `self.log` would drop what falls between steps."""
        if self.logger is not None:
            self.logger.log_metrics(dict(metrics), step=self.global_step if at is None else at)

    def backward_of(self, loss: Tensor, batch: Batch) -> None:
        """Backward pass of a scaled loss, counted as one gradient evaluation."""
        self.manual_backward(loss)
        self.cost.add(num_tokens=count_tokens(batch))

    def total_tokens(self) -> int:
        """Tokens that all processes have spent so far; all must ask."""
        tokens = torch.tensor(self.cost.tokens, device=self.device)
        return int(self.trainer.strategy.reduce(tokens, reduce_op="sum"))  # type: ignore[arg-type]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss on held-out conversations."""
        self._log_held_out("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`."""
        self._log_held_out("test", batch)

    def _log_held_out(self, stage: str, batch: Batch) -> None:
        loss, several = causal_lm_loss(self.model, batch), self.trainer.world_size > 1
        size = count_conversations(batch)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=size, sync_dist=several)
        if self.trainer.state.fn == "fit":
            # Lightning takes this as the place on the logger's axis, instead of counting batches.
            place = {"on_step": False, "on_epoch": True, "reduce_fx": "max", "batch_size": 1}
            self.log("step", float(self.global_step), sync_dist=several, **place)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters and the random state of the run."""
        checkpoint["defense"] = {
            "class": type(self).__name__,
            "cost": {**self.cost.state(), "tokens": self.total_tokens()},
            "weights_moved": self.step_check.share,
            "fsdp1": uses_fsdp1(self.trainer),
            "random_states": collect_generators(self.device, self.trainer.world_size),
        }
        if self.attack_source is not None:
            self.attack_source.save(checkpoint, self.all_weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the counters and the random state of the run.

        Raises:
            CheckpointError: If the checkpoint is not one of this defense.
        """
        state = checkpoint.get("defense", {})
        require_readable(state, self)
        self.cost = Cost(**state["cost"])
        self.step_check.restore(state.get("weights_moved"))
        if self.global_rank > 0:
            self.cost.tokens = 0  # The first process goes on with the sum.
        self._restored_random_states = state["random_states"]
        with_plain_optimizers(checkpoint, self)
        if self.attack_source is not None:
            self.attack_source.load(checkpoint, self.all_weights, self.trainer.ckpt_path)
