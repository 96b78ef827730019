"""Readers for published benchmarks: prompts without answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from patcher_pl.data.readers import (
    Reader,
    RowError,
    optional_text,
    question_and_answer,
    require_text,
)
from patcher_pl.types import Conversation

Kind = Literal["standard", "contextual", "copyright"]


@dataclass(frozen=True, kw_only=True)
class HarmBench(Reader):
    """HarmBench's text behaviors: a request, and for contextual ones a text that it is about.

    The context comes before the request, as in HarmBench's own direct requests: context, a line
    `---`, request. Its images are not supported.

    Args:
        kinds: Behaviors to take, by their column `FunctionalCategory`; None takes every row and
            needs no such column. Copyright behaviors are left out by default: HarmBench looks for
            the protected text in the answer, which a judge of compliance does not.
        behavior: Column of the request.
        context: Column of the context; rows may leave it empty.

    References:
        Mazeika et al., 2024, https://arxiv.org/abs/2402.04249. Columns of
        `data/behavior_datasets/harmbench_behaviors_text_all.csv` in
        https://github.com/centerforaisafety/HarmBench: Behavior, FunctionalCategory,
        SemanticCategory, Tags, ContextString, BehaviorID. Its copy on the hub (walledai/HarmBench)
        has prompt and context, and the kind as name of the configuration.
    """

    kinds: list[Kind] | None = field(default_factory=lambda: ["standard", "contextual"])
    behavior: str = "Behavior"
    context: str = "ContextString"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        if self.kinds is not None and require_text(row, "FunctionalCategory") not in self.kinds:
            return None
        request, context = require_text(row, self.behavior), optional_text(row, self.context)
        prompt = f"{context}\n\n---\n\n{request}" if context else request
        return question_and_answer(prompt, None, harmful=True, origin=origin)


@dataclass(frozen=True, kw_only=True)
class StrongReject(Reader):
    """StrongREJECT's forbidden prompts.

    Args:
        prompt: Column of the prompt.
        without_sources: Rows to leave out by their column `source`: where the prompt was taken
            from (AdvBench among them), for figures that must not count a prompt twice.

    References:
        Souly et al., 2024, https://arxiv.org/abs/2402.10260. Columns of
        `strongreject_dataset/strongreject_dataset.csv` in
        https://github.com/alexandrasouly/strongreject: category, source, forbidden_prompt. Its copy
        on the hub (walledai/StrongREJECT) calls the last one prompt.
    """

    prompt: str = "forbidden_prompt"
    without_sources: list[str] = field(default_factory=list)

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        if self.without_sources and require_text(row, "source") in self.without_sources:
            return None
        return question_and_answer(
            require_text(row, self.prompt), None, harmful=True, origin=origin
        )


@dataclass(frozen=True, kw_only=True)
class XsTest(Reader):
    """XSTest: safe prompts that sound unsafe, and their truly unsafe contrasts.

    A refusal of a safe one is an over-refusal: asked as benign prompts, one minus the rate is the
    over-refusal rate of judges that look for refusals.

    Args:
        prompts: Which prompts are taken.

    References:
        Röttger et al., 2023, https://arxiv.org/abs/2308.01263. Columns of `xstest_prompts.csv` in
        https://github.com/paul-rottger/xstest (Paul/XSTest on the hub): id, prompt, type, label
        (safe or unsafe), focus, note. Older copies have no label; there the contrasts are the rows
        whose type starts with `contrast_`.
    """

    prompts: Literal["safe", "unsafe", "all"] = "all"

    def read(self, row: Mapping[str, Any], *, harmful: bool, origin: str) -> Conversation | None:
        unsafe = self._is_unsafe(row)
        if self.prompts != "all" and unsafe != (self.prompts == "unsafe"):
            return None
        return question_and_answer(require_text(row, "prompt"), None, harmful=unsafe, origin=origin)

    def _is_unsafe(self, row: Mapping[str, Any]) -> bool:
        label = optional_text(row, "label")
        if not label:
            return require_text(row, "type").startswith("contrast_")
        if label not in ("safe", "unsafe"):
            raise RowError("label", f"must be safe or unsafe, got {label!r:.60}")
        return label == "unsafe"
