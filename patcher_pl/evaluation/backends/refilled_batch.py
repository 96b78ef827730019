"""Decoding in which a finished answer leaves the batch at once and a waiting prompt takes its place.

`generate` of transformers goes on until the longest answer of a batch ends, and fills the others with
padding until then; most answers are a fraction as long.
"""

import copy
import inspect
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache

from patcher_pl.evaluation.backends.base import Decoding
from patcher_pl.evaluation.backends.padding import left_padded
from patcher_pl.evaluation.backends.refillable import cache_argument
from patcher_pl.evaluation.backends.slot_cache import SlotCache
from patcher_pl.evaluation.backends.token_choice import TokenChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Prompts are read as soon as one place in so many is free: in groups, they are read faster.
PLACES_PER_GROUP = 8


@torch.no_grad()
def continued(
    model: "PreTrainedModel", prompts: Sequence[list[int]], decoding: Decoding
) -> list[list[int]]:
    """Returns the new tokens of every prompt, up to and with its stop token.

    Args:
        model: One that `can_refill` says yes to, in evaluation mode.
        prompts: Token ids, each shorter than the context.
        decoding: How tokens are drawn.
    """
    answers = [_Answer(prompt, decoding) for prompt in prompts]
    # Prompts of similar length are read together.
    waiting = deque(sorted(answers, key=lambda answer: len(answer.prompt)))
    columns = max(map(len, prompts), default=0) + decoding.max_new_tokens
    size = min(decoding.batch_size, len(prompts))
    batch = _Batch(model, decoding, size, columns, shared_start(prompts))
    while waiting or batch.answers:
        free = batch.size - len(batch.answers)
        if waiting and (not batch.answers or free * PLACES_PER_GROUP >= batch.size):
            batch.read([waiting.popleft() for _ in range(min(free, len(waiting)))])
        else:
            batch.step()
        batch.drop_finished()
    return [answer.tokens for answer in answers]


def shared_start(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens that all of several prompts start with; the last one of each is left to itself.

    A system prompt, or what a template writes before the first word: often half of the prompt.
    """
    if len(prompts) < 2:
        return []
    # In order of their tokens, the first and the last one differ soonest.
    pair = zip(min(prompts), max(prompts), strict=False)
    num_equal = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], pair))
    return prompts[0][: min(num_equal, min(map(len, prompts)) - 1)]


class _Answer:
    """One prompt, and what was answered so far."""

    def __init__(self, prompt: list[int], decoding: Decoding) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self._stop_ids = frozenset(decoding.stop_ids)
        self._room = decoding.max_new_tokens
        if decoding.context is not None:
            self._room = min(self._room, decoding.context - len(prompt))

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self._room or self.tokens[-1] in self._stop_ids


class _Batch:
    """The answers in progress, one row each, in no order.

    Args:
        model: What is asked.
        decoding: How tokens are drawn.
        size: Most rows at a time (count).
        columns: Longest prompt and answer together (tokens).
        shared: Tokens that all prompts start with; they are read once.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        decoding: Decoding,
        size: int,
        columns: int,
        shared: list[int],
    ) -> None:
        self.size = size
        self.answers: list[_Answer] = []
        self._forward = _Forward(model)
        self._choose = TokenChoice(decoding)
        self._pad_id = decoding.pad_id
        self._cache = SlotCache(len(DynamicCache(config=model.config).layers), size, columns)
        # By row: its newest token, which the model has not read, the column of the cache where that
        # will be, and its place in the text.
        device = next(model.parameters()).device
        self._newest, self._column, self._position = torch.zeros(
            3, size, dtype=torch.long, device=device
        )
        # By row and column: whether the column is part of the row's text, and the token there.
        self._visible, self._said = torch.zeros(2, size, columns, dtype=torch.long, device=device)
        self._ends: list[int] = []  # As `_column`, without asking the device.
        self._shared = torch.tensor([shared], dtype=torch.long, device=device)
        self._start = DynamicCache(config=model.config)
        if shared:
            here = torch.arange(len(shared), device=device)[None]
            self._forward(self._shared, torch.ones_like(self._shared), here, self._start)

    def read(self, answers: list[_Answer]) -> None:
        """Reads the prompts of new `answers` and says their first tokens."""
        num_shared = self._shared.shape[1]
        own = [answer.prompt[num_shared:] for answer in answers]
        rows = slice(len(self.answers), len(self.answers) + len(answers))
        input_ids, mask = (ids.to(self._newest.device) for ids in left_padded(own, self._pad_id))
        positions = num_shared + (mask.cumsum(dim=1) - 1).clamp(min=0)
        # What was said counts once, however often it stands there: the last token fills the gaps.
        said = torch.where(mask == 1, input_ids, input_ids[:, -1:])
        shared = self._shared.expand(len(answers), -1)
        said, mask = torch.cat([shared, said], dim=1), pad(mask, (num_shared, 0), value=1)
        length = mask.shape[1]
        cache = self._started(len(answers))
        logits = self._forward(input_ids, mask, positions, cache)
        self._cache.append(cache)
        self._newest[rows] = self._choose(said, logits)
        self._column[rows] = length
        self._position[rows] = positions[:, -1] + 1
        self._visible[rows] = 0
        self._visible[rows, :length] = mask
        self._said[rows] = said[:, -1:]
        self._said[rows, :length] = said
        self._ends += [length] * len(answers)
        self.answers += answers
        self._note(rows)

    def step(self) -> None:
        """Says one more token of every answer."""
        rows, width = slice(0, len(self.answers)), max(self._ends) + 1
        newest, column = self._newest[rows, None], self._column[rows, None]
        self._visible[rows].scatter_(1, column, 1)
        self._said[rows].scatter_(1, column, newest)
        self._cache.aim(self._column[rows], width)
        visible = self._visible[rows, :width]
        logits = self._forward(newest, visible, self._position[rows, None], self._cache)
        self._newest[rows] = self._choose(self._said[rows, :width], logits)
        self._column[rows] += 1
        self._position[rows] += 1
        self._ends = [end + 1 for end in self._ends]
        self._note(rows)

    def drop_finished(self) -> None:
        """Lets go of answers that ended; the last rows move to where those were."""
        going_on = [row for row, answer in enumerate(self.answers) if not answer.finished]
        num_rows = len(going_on)
        if num_rows == len(self.answers):
            return
        gaps = sorted(set(range(num_rows)) - set(going_on))
        sources = going_on[num_rows - len(gaps) :]
        for gap, source in zip(gaps, sources, strict=True):
            self.answers[gap], self._ends[gap] = self.answers[source], self._ends[source]
        del self.answers[num_rows:], self._ends[num_rows:]
        to, of = torch.tensor([gaps, sources], dtype=torch.long, device=self._newest.device)
        for state in (self._newest, self._column, self._position, self._visible, self._said):
            state[to] = state[of]
        self._cache.keep(num_rows, of, to)

    def _started(self, num_rows: int) -> DynamicCache:
        """A cache of new rows that have read what all prompts start with."""
        cache = copy.deepcopy(self._start)
        cache.batch_repeat_interleave(num_rows)
        return cache

    def _note(self, rows: slice) -> None:
        # The one place where the host waits for the device.
        for answer, token in zip(self.answers[rows], self._newest[rows].tolist(), strict=True):
            answer.tokens.append(token)


class _Forward:
    """A model's next-token logits, by the names of its own arguments."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        cache_name = cache_argument(model)
        assert cache_name is not None
        self._cache_name = cache_name
        takes = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def __call__(
        self,
        input_ids: Int[Tensor, "rows new"],
        mask: Int[Tensor, "rows seen"],
        positions: Int[Tensor, "rows new"],
        cache: Cache,
    ) -> Float[Tensor, "rows vocab"]:
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        arguments |= {"position_ids": positions, self._cache_name: cache, **self._options}
        return self.model(**arguments, use_cache=True, return_dict=True).logits[:, -1]
