"""Trained input vectors before every question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patcher_pl.errors import ConfigError
from patcher_pl.models.peers import gathered_here, require_whole
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.base import AttackPoint
from patcher_pl.redteam.finetuning import FinetuningAttack
from patcher_pl.redteam.material import AttackMaterial, RowKind
from patcher_pl.types import Message
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(FinetuningAttack):
    """Trains vectors that stand before every harmful question, and no weight of the model.

    The vectors take the place of `tokens` of the vocabulary that occur nowhere else; those are put
    before the question, in training and when asking, and only their input vectors are trained, from
    their own values, on harmful rows. One prompt for all questions. Benign questions are asked
    without it and meet the released model. The model's input embeddings become a `PromptEmbedding`.

    See `FinetuningAttack` for the other settings.

    Args:
        tokens: Tokens whose vectors are trained, all different, unused otherwise, and written such
            that the tokenizer sees each as one: reserved special tokens, for instance.

    Raises:
        ValueError: If there is no token, or one is there twice.
        ConfigError: When run, if the tokenizer does not see them so, or the questions hold one.

    References:
        Schwinn et al., 2024, https://arxiv.org/abs/2402.09063, the universal attack. Prompt tuning:
        Lester et al., 2021, https://arxiv.org/abs/2104.08691.
    """

    kind: ClassVar[str] = "soft_prompt"

    tokens: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            bool(self.tokens) and len(set(self.tokens)) == len(self.tokens),
            "tokens",
            "different tokens, at least one",
            "Name reserved tokens of the model's tokenizer.",
        )

    @property
    def needed_rows(self) -> frozenset[RowKind]:
        return frozenset({"harmful"})

    def run(self, model: "PreTrainedModel", material: AttackMaterial) -> Iterator[AttackPoint]:
        """See `Attack.run`."""
        rows = material.select("harmful")
        token_ids = self._token_ids(material, rows[0].prompt)
        model.requires_grad_(False)
        with gathered_here(model):
            require_whole(model, f"{self.name}: a copy of input vectors")
            embedding = PromptEmbedding(model.get_input_embeddings(), token_ids)
        model.set_input_embeddings(embedding)
        model.eval()  # Nothing of it is trained, so nothing of it drops out.
        batches = material.batches(self.batch_size, rows, self.wording)
        yield from self.points(model, self.steps(model, [embedding.vectors], batches))

    def prompt(self, messages: Sequence[Message], material: AttackMaterial) -> tuple[Message, ...]:
        """See `Attack.prompt`; puts the tokens before the question."""
        return self.wording.reworded(messages)

    @property
    def wording(self) -> Asking:
        return replace(self.asking, template="".join(self.tokens) + self.asking.template)

    def _token_ids(self, material: AttackMaterial, question: Sequence[Message]) -> list[int]:
        tokenizer, chat = material.tokenizer, material.chat
        token_ids = _ids(tokenizer, "".join(self.tokens))
        plain = chat.prompt_ids(tokenizer, self.asking.reworded(question))
        worded = chat.prompt_ids(tokenizer, self.wording.reworded(question))
        used = set(token_ids) & set(plain)
        if used or len(set(token_ids)) != len(self.tokens) or not _contains(worded, token_ids):
            raise ConfigError(
                f"SoftPrompt.tokens {self.tokens} are the tokens {token_ids} to this tokenizer"
                + (f", and questions hold {sorted(used)} already" if used else "")
                + ". Name tokens of its vocabulary that nothing else uses, one vector each."
            )
        return token_ids


class PromptEmbedding(nn.Module):
    """Token embeddings in which some tokens have trainable vectors, beside the matrix.

    Args:
        inner: The model's own embeddings.
        token_ids: Tokens with vectors of their own.
    """

    place: Tensor

    def __init__(self, inner: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__()
        weight: Any = inner.weight
        chosen = torch.tensor(token_ids, device=weight.device)
        place = torch.full((len(weight),), -1, device=weight.device)
        place[chosen] = torch.arange(len(chosen), device=weight.device)
        self.inner = inner
        self.register_buffer("place", place, persistent=False)
        with torch.no_grad():
            self.vectors = nn.Parameter(inner(chosen).clone())

    @property
    def weight(self) -> Tensor:
        """The matrix of the model's own embeddings."""
        weight: Any = self.inner.weight
        return weight

    def forward(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """Looks tokens up."""
        place = self.place[input_ids]
        own = self.vectors[place.clamp(min=0)]
        return torch.where((place >= 0).unsqueeze(-1), own, self.inner(input_ids))


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(
        list(ids[start : start + len(part)]) == list(part)
        for start in range(len(ids) - len(part) + 1)
    )
