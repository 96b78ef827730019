"""Both sides of the training benchmark: the package's own classes, and the plain loop."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from patcher_pl.attackers import Attacker, Carried
from patcher_pl.attackers.base import AttackOutcome
from patcher_pl.attackers.loop import FinetuneStep, finetune
from patcher_pl.data import BatchStream
from patcher_pl.data.chat import Encoded
from patcher_pl.defenses import Patcher
from patcher_pl.models import LanguageModel, Weights, packed_attention
from patcher_pl.models.acceleration import accelerated
from patcher_pl.optim import AdamW
from patcher_pl.types import Batch, count_tokens
from tools.throughput.plain_loop import PlainSteps
from tools.throughput.workload import PAD_ID, SHAPES, OwnWork, conversations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LR, VECTOR_SCALE, MAX_GRAD_NORM = 1e-5, 1e-3, 1.0
AfterStep = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides train, and on what.

    Args:
        shape: Name in `SHAPES`.
        own: A model and conversations in the place of random ones.
        dtype: Name of torch's number format.
        our_dtype: Another one for the weights of our side, which trains copies in float32 where it is a
            smaller one; None takes the same.
        device: As torch names it.
        attn: Attention of transformers; None takes its default. Both sides get it.
        our_attn: Another one for our side; None takes the same.
        compile: Whether our side compiles its model.
        liger: Whether our side takes Liger's kernels.
        autocast: Computes in bfloat16 on weights of `dtype`, on both sides.
        batch_size: Conversations per batch (count).
        num_conversations: From which the batches are drawn (count).
        seed: Decides weights, conversations, their order and the attack vector.
    """

    shape: str = "miniature"
    own: OwnWork | None = None
    dtype: str = "float32"
    our_dtype: str | None = None
    device: str = "cpu"
    attn: str | None = None
    our_attn: str | None = None
    compile: bool = False
    liger: bool = False
    autocast: bool = False
    batch_size: int = 4
    num_conversations: int = 512
    seed: int = 0

    @cached_property
    def examples(self) -> list[Encoded]:
        """The conversations of both sides."""
        if self.own is not None:
            return self.own.conversations()
        return conversations(self.num_conversations, SHAPES[self.shape], self.seed)

    def build(self, dtype: str | None = None) -> "PreTrainedModel":
        """Returns the model, the same on both sides but for the number format."""
        chosen: torch.dtype = getattr(torch, dtype or self.dtype)
        if self.own is not None:
            model = self.own.build(chosen)
        else:
            # On the device itself: drawing billions of weights on a CPU takes minutes.
            with torch.device(self.device):
                model = SHAPES[self.shape].build(chosen, self.seed)
        if self.attn is not None:
            model.set_attn_implementation(self.attn)
        return model.to(self.device)  # type: ignore[arg-type]

    def vector(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns the attack vector: small random numbers."""
        device = torch.device(self.device)
        generator = torch.Generator(device).manual_seed(self.seed)
        drawn = (torch.randn(p.shape, generator=generator, device=device) for p in parameters)
        return [
            (VECTOR_SCALE * change).to(parameter.device, parameter.dtype)
            for change, parameter in zip(drawn, parameters, strict=True)
        ]

    def stream(self, *, packing: bool) -> BatchStream:
        """Returns batches; the conversations of each do not depend on `packing`."""
        return BatchStream(
            self.examples,
            batch_size=self.batch_size,
            pad_token_id=PAD_ID if self.own is None else int(self.own.tokenizer.pad_token_id),  # type: ignore[arg-type]
            seed=self.seed,
            packing=packing,
        )

    def rows(self, num_steps: int) -> list[Batch]:
        """The first batches, packed, for counting."""
        batches = self.stream(packing=True).endless()
        return [next(batches) for _ in range(num_steps)]

    def tokens(self, num_steps: int) -> list[int]:
        """Tokens of the first batches, padding excluded."""
        return [count_tokens(batch) for batch in self.rows(num_steps)]

    def flops_per_token(self, num_steps: int) -> float:
        """Floating-point operations of a forward and a backward pass, per token.

        6 per weight of the layers and token, and per weight of the vocabulary and answer token (no
        other logits matter); 6 per layer, unit and pair of tokens that attend, which are half of the
        squares of the lengths.
        """
        from transformers import AutoModelForCausalLM

        batches = self.rows(num_steps)
        shape: Any = SHAPES[self.shape].config() if self.own is None else self.own.config()
        head = shape.vocab_size * shape.hidden_size
        embeddings = head if shape.tie_word_embeddings else 2 * head
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(shape)
        weights = sum(p.numel() for p in built.parameters()) - embeddings
        width = shape.num_hidden_layers * shape.hidden_size
        total = 0
        for batch in batches:
            assert "position_ids" in batch and "logits_to_keep" in batch
            lengths = (batch["position_ids"] + 1)[0].double()  # As many tokens as each attends to.
            total += 6 * weights * len(lengths) + 6 * head * len(batch["logits_to_keep"])
            total += 12 * width * float(lengths.sum())
        return total / sum(count_tokens(batch) for batch in batches)

    def plain(self, part: str) -> PlainSteps:
        """The plain loop of a part, before its first step."""
        model = self.build()
        parameters = list(model.parameters())
        return PlainSteps(
            model,
            self.stream(packing=False).endless(),
            lr=LR,
            attack_vector=self.vector(parameters) if part == "defender" else None,
            max_grad_norm=MAX_GRAD_NORM,
        )

    def run_plain(self, part: str, num_steps: int, after_step: AfterStep) -> None:
        """Takes steps of the plain loop."""
        side = self.plain(part)
        for _ in range(num_steps):
            with self.computing():
                loss = side.step()
            after_step(loss)

    def run_ours(self, part: str, num_steps: int, after_step: AfterStep) -> None:
        """Takes steps of this package: a `fit` for the defender, `finetune` for the attacker."""
        run = self._fit if part == "defender" else self._attack
        run(num_steps, after_step)

    def computing(self) -> AbstractContextManager[Any]:
        """Autocast where it is asked for, for what no Trainer runs."""
        device_type = torch.device(self.device).type
        return torch.autocast(
            device_type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        )

    def load_ours(self) -> "PreTrainedModel":
        """The model of our side, with the attention, kernels and compiled blocks asked for."""
        return self._built.load_model()

    @property
    def _built(self) -> "_Built":
        return _Built(path="built here", setting=self, compile=self.compile, liger=self.liger)

    def _fit(self, num_steps: int, after_step: AfterStep) -> None:
        defense = Patcher(
            self._built,
            _Given(setting=self),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
            refresh_every=num_steps + 1,
            num_sft_steps=0,
            max_grad_norm=MAX_GRAD_NORM,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="gpu" if self.device.startswith("cuda") else "cpu",
                devices=1,
                precision="bf16-mixed" if self.autocast else "32-true",
                max_steps=num_steps,
                logger=TensorBoardLogger(folder),
                log_every_n_steps=min(50, len(self.stream(packing=True))),
                callbacks=[_AfterStep(after_step)],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                use_distributed_sampler=False,
            )
            trainer.fit(defense, _Stream(self))

    def _attack(self, num_steps: int, after_step: AfterStep) -> None:
        model = self.load_ours().train()
        steps = finetune(
            model,
            model.parameters(),
            self.stream(packing=True).endless(),
            optimizer=AdamW(lr=LR, fused=True),
            num_steps=num_steps,
            max_grad_norm=MAX_GRAD_NORM,
        )
        with self.computing():
            for step in steps:
                after_step(step.loss)


@dataclass(frozen=True, kw_only=True)
class _Built(LanguageModel):
    """A model with random weights in the place of one that is loaded."""

    setting: Setting

    def load_model(self) -> "PreTrainedModel":
        model = self.setting.build(self.setting.our_dtype)
        if self.setting.our_attn is not None:
            packed_attention.register()
            model.set_attn_implementation(self.setting.our_attn)
        return accelerated(self.adapted(model), compile_=self.compile, liger=self.liger)


@dataclass(frozen=True, kw_only=True)
class _Given(Attacker):
    """An attack whose vector is known beforehand, so that both sides defend against the same."""

    setting: Setting
    num_steps: int = 1

    def attack(
        self,
        model: nn.Module,
        weights: Weights,
        batches: Iterator[Batch],
        before_step: Callable[[], None] = lambda: None,
        start: Carried | None = None,
    ) -> AttackOutcome:
        step = FinetuneStep(1, 0.0, 0.0, 0)
        return AttackOutcome(self.setting.vector(weights.parameters), [step])


class _Stream(LightningDataModule):
    has_attack = True

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._stream = setting.stream(packing=True)
        self.seed = setting.seed

    def train_dataloader(self) -> BatchStream:
        return self._stream

    def val_dataloader(self) -> list[Any]:
        return []

    def attack_stream(self) -> BatchStream:
        return self._stream


class _AfterStep(Callback):
    def __init__(self, after_step: AfterStep) -> None:
        self._after_step = after_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_step(float(trainer.callback_metrics["train/loss_safe"]))
