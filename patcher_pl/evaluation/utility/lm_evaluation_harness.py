"""Tasks of EleutherAI's lm-evaluation-harness."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.contents import data_digest
from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.evaluation.generate import evaluating
from patcher_pl.evaluation.utility.base import UtilityMeasure
from patcher_pl.models.peers import compute_device, require_whole
from patcher_pl.randomness import keeping_generators, seeded
from patcher_pl.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class LmEval(UtilityMeasure):
    """Scores of tasks such as `arc_easy`, `gsm8k` or `mmlu`, on the live model.

    Measures every metric of every task as `lm_eval/<task>/<metric>`, with `/<filter>` behind it
    where a task filters answers in several ways. Needs `pip install 'patcher-pl[eval]'`; most tasks
    fetch their data from the hub.

    The chat format of the red team is not used: the harness words its own prompts.

    Args:
        tasks: Names of tasks or groups.
        limit: Examples per task (count, >= 1); None takes all.
        num_fewshot: Solved examples before each question (count, >= 0); None leaves it to the task.
        batch_size: Sequences read at once (count, >= 1).
        apply_chat_template: Put prompts into the tokenizer's chat template.
        include_path: Directory with further tasks as YAML files.
        include_defaults: Whether the tasks that come with the harness can be named.

    Raises:
        ValueError: If a value is out of its range.

    References:
        https://github.com/EleutherAI/lm-evaluation-harness.
    """

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    include_path: str | None = None
    include_defaults: bool = True

    def __post_init__(self) -> None:
        require(self, bool(self.tasks), "tasks", "at least one task")
        require(self, self.limit is None or self.limit >= 1, "limit", ">= 1 or null")
        require(self, self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", ">= 0")
        require(self, self.batch_size >= 1, "batch_size", ">= 1")

    @property
    def default_name(self) -> str:
        return "lm_eval"

    def contents(self) -> Mapping[str, str]:
        """See `NamesContents`: the user's own tasks."""
        if self.include_path is None or not Path(self.include_path).expanduser().exists():
            return {}
        return {"include_path": data_digest(self.include_path) or self.include_path}

    def prepare(self) -> None:
        """See `UtilityMeasure.prepare`; the data of the tasks are not fetched yet."""
        with keeping_generators():
            known = self._task_manager.all_tasks
        if unknown := [task for task in self.tasks if task not in known]:
            raise ConfigError(
                f"LmEval.tasks: lm-evaluation-harness knows no {', '.join(map(repr, unknown))}. "
                "`lm-eval ls tasks` lists what there is; LmEval.include_path adds your own."
            )

    def measure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        chat: ChatFormat,
        *,
        seed: int,
    ) -> dict[str, float]:
        """See `UtilityMeasure.measure`.

        Raises:
            DataError: If the data of a task cannot be loaded.
            ConfigError: If the harness is not installed or knows no such task.
        """
        self.prepare()
        try:
            with keeping_generators():
                found = self._evaluated(model, tokenizer, seed)
        except (OSError, ValueError) as error:
            raise DataError(
                f"LmEval.tasks: {', '.join(self.tasks)} could not be run ({error}). Most tasks fetch "
                "their data from the Hugging Face hub."
            ) from error
        return {
            f"{self.name}/{task}/{_metric_name(key)}": float(value)
            for task, metrics in found.items()
            for key, value in metrics.items()
            if _is_metric(key, value)
        }

    def _evaluated(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", seed: int
    ) -> Any:
        """The harness's own table: metrics by task."""
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

        require_whole(model, self.name)  # The harness knows nothing of other processes.
        device = compute_device(model)
        with seeded(seed, device), evaluating(model):
            found: Any = simple_evaluate(
                # A copy, since the harness sets a pad token.
                model=HFLM(
                    pretrained=model,
                    tokenizer=deepcopy(tokenizer),
                    backend="causal",
                    batch_size=self.batch_size,
                ),
                tasks=list(self.tasks),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=self.apply_chat_template,
                task_manager=self._task_manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        assert found is not None
        # A group such as `mmlu` may stand apart from its tasks.
        return {**found["results"], **found.get("groups", {})}

    @cached_property
    def _task_manager(self) -> Any:
        if find_spec("lm_eval") is None:
            raise ConfigError(
                "RedTeam.utility: LmEval needs lm-evaluation-harness, which is not installed. "
                "Run `pip install 'patcher-pl[eval]'`."
            )
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

        return TaskManager(include_path=self.include_path, include_defaults=self.include_defaults)


def _is_metric(key: str, value: Any) -> bool:
    # Beside metrics (`acc,none`) there are their errors and the task's name and size.
    metric, separator, _ = key.partition(",")
    return bool(separator) and not metric.endswith("_stderr") and isinstance(value, int | float)


def _metric_name(key: str) -> str:
    metric, _, kind = key.partition(",")
    return metric if kind == "none" else f"{metric}/{kind}"
