"""Removal of the direction in which the model tells what it refuses."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patcher_pl.data.collate import collate, encode_all
from patcher_pl.data.masks import Encoded
from patcher_pl.errors import DataError, PatcherError
from patcher_pl.evaluation.generate import evaluating
from patcher_pl.losses import causal_lm_loss
from patcher_pl.models.blocks import untied_embeddings
from patcher_pl.models.peers import compute_device, gathered_here, require_whole
from patcher_pl.redteam.base import Attack, AttackPoint, forward_flops
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.redteam.residual_stream import ResidualStream, remove_direction_
from patcher_pl.types import IGNORE_INDEX, Batch, Conversation, move_batch
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Prompts read at once; changes nothing but memory and time.
_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Abliteration(Attack):
    """Makes every matrix that writes to the residual stream orthogonal to the refusal direction.

    The direction after a block is r = mean over harmful prompts - mean over benign prompts of the
    residual stream at the prompt's last token. Token and position embeddings, and the layers with
    which attention and MLP write, biases included, lose their component along it:
    W - r r^T W. Where the output head is tied to the embeddings it gets a copy of its own first and
    stays as released.

    With one direction for all layers, that of the block is taken whose removal makes the attacker's
    own harmful answers most likely (least loss). The source chooses by refusal tokens instead, which
    would have to be known, among the first 80 % of the blocks. With `per_layer`, each block is freed
    of the direction after it, and the embeddings of the first one.

    No optimizer steps: one point, at 0 steps. Reads harmful and benign rows of the attacker's data;
    its cost is that of reading them.

    Args:
        per_layer: Give every layer its own direction.
        num_prompts: Prompts of each kind that are read (count, >= 1), in the order of the seed.

    Raises:
        ValueError: If `num_prompts` is below 1.
        DataError: When run, if the data lack a kind, or the model sees no difference between them.
        PatcherError: When run, if the model is built such that the direction would not be gone.

    References:
        Arditi et al., 2024, https://arxiv.org/abs/2406.11717, sections 2.3, 2.4 and 4.1, with 128
        prompts of each kind.
    """

    per_layer: bool = False
    num_prompts: int = 128

    def __post_init__(self) -> None:
        require(self, self.num_prompts >= 1, "num_prompts", ">= 1", "128 are common.")

    @property
    def default_name(self) -> str:
        return "abliteration_per_layer" if self.per_layer else "abliteration"

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"harmful", "benign"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        harmful, benign = (
            material.select(kind)[: self.num_prompts] for kind in ("harmful", "benign")
        )
        untied_embeddings(model)
        device = compute_device(model)
        prompts = [
            [move_batch(batch, device) for batch in self._prompts(rows, material)]
            for rows in (harmful, benign)
        ]
        answers: list[Batch] = []
        with torch.no_grad(), evaluating(model), gathered_here(model):
            require_whole(model, f"{self.name}: the residual stream")
            stream = ResidualStream.of(model, prompts[0][0])
            directions = refusal_directions(stream, *prompts)
            if not self.per_layer:
                answers = [move_batch(batch, device) for batch in self._answers(harmful, material)]
                best = best_direction(stream, directions, answers)
                answers *= len(directions)  # As often as they were read.
                directions = best.expand_as(directions)
            before = stream.written(prompts[0][0], directions)
        for number, module in stream.layers():
            remove_direction_(module, directions[number])
        with torch.no_grad(), evaluating(model), gathered_here(model):
            after = stream.written(prompts[0][0], directions)
        _require_gone(model, before, after)
        # Beside the prompts, the first batch is read before and after; finding the stream is a row.
        batches = [*prompts[0], *prompts[1], *answers, *prompts[0][:1] * 2]
        num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        yield AttackPoint(0, num_tokens, math.nan, forward_flops(model, num_tokens))

    def _prompts(self, rows: Sequence[Conversation], material: AttackMaterial) -> list[Batch]:
        chat, tokenizer = material.chat, material.tokenizer
        ids = [
            chat.prompt_ids(tokenizer, self.asking.reworded(row.prompt, harmful=row.harmful))
            for row in rows
        ]
        fitting = [one for one in ids if len(one) <= chat.max_length]
        if len(fitting) < len(ids):
            logger.warning(
                "Abliteration leaves %d of %d prompts out, which are longer than %d tokens "
                "(ChatFormat.max_length, or what the model reads).",
                *(len(ids) - len(fitting), len(ids), chat.max_length),
            )
        if not fitting:
            raise DataError(
                f"Abliteration: every prompt is longer than {chat.max_length} tokens "
                "(ChatFormat.max_length, or what the model reads). Shorten the data."
            )
        unlabeled = [Encoded(one, [IGNORE_INDEX] * len(one)) for one in fitting]
        return _batches(unlabeled, material)

    def _answers(self, rows: Sequence[Conversation], material: AttackMaterial) -> list[Batch]:
        worded = [self.asking.reworded_row(row) for row in rows]
        return _batches(encode_all(material.tokenizer, material.chat, worded), material)


def refusal_directions(
    stream: ResidualStream, harmful: Sequence[Batch], benign: Sequence[Batch]
) -> Float[Tensor, "layers width"]:
    """Unit vectors from the mean benign to the mean harmful prompt, after every block.

    Raises:
        DataError: If the means are the same after a block.
    """
    means = [
        torch.cat([stream.last_positions(batch) for batch in batches]).mean(dim=0)
        for batches in (harmful, benign)
    ]
    differences = means[0] - means[1]
    lengths = differences.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise DataError(
            "Abliteration: harmful and benign prompts are the same to the model. "
            "Check which rows the red team's sources call harmful."
        )
    return differences / lengths


def best_direction(
    stream: ResidualStream, directions: Float[Tensor, "layers width"], answers: Sequence[Batch]
) -> Float[Tensor, " width"]:
    """The direction without which the answers have the least loss."""
    losses = []
    for direction in directions:
        with stream.without(direction):
            losses.append(_loss(stream, answers))
    return directions[losses.index(min(losses))]


def _loss(stream: ResidualStream, answers: Sequence[Batch]) -> float:
    """Mean loss over the answer tokens of all batches (nats per token)."""
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in answers]
    losses = [float(causal_lm_loss(stream.model, batch)) for batch in answers]
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    return total / sum(counts)


def _batches(examples: Sequence[Encoded], material: AttackMaterial) -> list[Batch]:
    pad_token_id = material.tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)
    return [
        collate(examples[start : start + _BATCH_SIZE], pad_token_id)
        for start in range(0, len(examples), _BATCH_SIZE)
    ]


def _require_gone(
    model: "PreTrainedModel", before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> None:
    """Refuses a result in which something still writes along a direction."""
    limit = torch.maximum(0.1 * before[0], 10 * after[1])
    left = (after[0] > limit).nonzero().flatten().tolist()
    if left:
        where = "the embeddings" if left[0] == 0 else f"block {left[0] - 1}"
        raise PatcherError(
            f"Abliteration does not know how {type(model).__name__} writes to its residual stream: "
            f"{where} still writes along the direction that was removed. Leave this attack away for "
            "such a model."
        )
