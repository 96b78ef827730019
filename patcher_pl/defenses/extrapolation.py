"""LoX: going on in the main directions of what alignment has changed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patcher_pl.errors import ConfigError
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.models.low_rank import main_directions, main_part
from patcher_pl.models.other_release import release_at, start_of, weights_of
from patcher_pl.models.shards import whole
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LowRankExtrapolation:
    """Low-rank extrapolation (LoX): once trained, W <- W + alpha U_k U_k^T (W - W_base).

    For every matrix, embeddings included; vectors stay. U_k are the left singular vectors of the k
    largest singular values of W - W_base, so that the added term is alpha times its best
    approximation of rank k. No training: it comes between the last step of any defense (or, with
    `trainer.max_steps: 0`, of none) and the export, so that probes during training see the model
    without it. Checkpoints hold what was trained; resumed runs extrapolate once.

    With adapters (`language_model.lora`) they are changed themselves: B <- B + alpha U_k U_k^T B. On
    sharded weights (FSDP2) every process gathers one matrix after the other.

    Args:
        rank: k (count, >= 1); None takes the whole difference. 6 is the source's for Llama-2-7B.
        alpha: How far (> 0); 1.25 is the source's.
        base: Where W_base lies, a hub id or local directory; None takes the model that training began
            with. Loaded into host memory, once for every process.

    Raises:
        ValueError: If a value is out of its range.
        ConfigError: When it is applied, if `base` has other weights, or is named for adapters.

    References:
        Perin et al., 2025, https://arxiv.org/abs/2506.15606, section 4.
    """

    rank: int | None = 6
    alpha: float = 1.25
    base: str | None = None

    def __post_init__(self) -> None:
        remedy = "null takes the whole difference."
        require(self, self.rank is None or self.rank >= 1, "rank", ">= 1 or null", remedy)
        require(self, self.alpha > 0, "alpha", "> 0", "Leave `extrapolation` away for none.")

    def require_fits(self, language_model: LanguageModel) -> None:
        """Refuses what cannot be done, before training.

        Raises:
            ConfigError: If `base` is named for adapters.
        """
        if self.base is not None and language_model.lora is not None:
            raise ConfigError(
                f"LowRankExtrapolation.base must be null with language_model.lora, got {self.base!r}: "
                "adapters hold the difference to the model that they began on, and no other."
            )

    @torch.no_grad()
    def apply(self, model: "PreTrainedModel", language_model: LanguageModel) -> None:
        """Changes the weights of a trained model in place; all processes that share it must call it.

        Args:
            model: What was trained.
            language_model: How its base is loaded.
        """
        self.require_fits(language_model)
        if language_model.lora is None:
            self._move_weights(model, language_model)
        else:
            self._move_adapters(model)

    def _move_weights(self, model: "PreTrainedModel", language_model: LanguageModel) -> None:
        weights = Weights(model)
        release = (
            start_of(language_model) if self.base is None else release_at(self.base, language_model)
        )
        base = weights_of(release, weights, "LowRankExtrapolation.base")

        def moved(name: str, aligned: Tensor) -> Tensor | None:
            if aligned.ndim < 2:
                return None
            change = aligned - base[name].to(aligned.device)
            # Of experts that share a tensor, each is a matrix of its own.
            return aligned + self.alpha * (
                change if self.rank is None else main_part(change, self.rank)
            )

        weights.edit(moved)

    def _move_adapters(self, model: "PreTrainedModel") -> None:
        from peft.tuners.lora import LoraLayer

        layers: dict[int, Any] = {
            id(layer.lora_B["default"].weight): layer  # type: ignore[index]
            for layer in model.modules()
            if isinstance(layer, LoraLayer)
        }
        weights = Weights(model, trained_only=True)
        owners = {
            name: layers[id(parameter)]
            for name, parameter in zip(weights.names, weights.parameters, strict=True)
            if id(parameter) in layers
        }

        def moved(name: str, outer: Tensor) -> Tensor | None:
            if name not in owners:
                return None  # A: the directions of B A are those of B.
            if self.rank is None:
                return (1 + self.alpha) * outer
            inner = whole(owners[name].lora_A["default"].weight.detach())
            directions = main_directions(outer @ inner, self.rank)
            return outer + self.alpha * directions @ (directions.mT @ outer.to(directions.dtype))

        weights.edit(moved)
