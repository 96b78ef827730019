"""Options of the `parity` command: whether two back ends answer alike."""

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import PatcherError
from patcher_pl.evaluation.backends import Backend, Vllm
from patcher_pl.evaluation.benchmark import Benchmark
from patcher_pl.evaluation.generate import Generation
from patcher_pl.evaluation.parity import partings
from patcher_pl.machine import choose_device
from patcher_pl.models.language_model import DtypeName, LanguageModel


def run_parity(
    model: str,
    prompts: Benchmark,
    backend: Backend | None = None,
    generation: Generation | None = None,
    chat: ChatFormat | None = None,
    dtype: DtypeName = "float32",
    tolerance: float = 0.1,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> None:
    """Lets two back ends answer the same prompts greedily, and says where their answers part.

    Where two tokens are almost equally likely, rounding decides; from there on answers differ though
    nothing is wrong. So each parting is told with how much the model prefers the first one's token.

    Args:
        model: Directory or hub id of the model.
        prompts: What is asked; `limit` takes so many of them.
        backend: What is compared with Hugging Face's generation; vLLM unless given.
        generation: Length of the answers, and the back end that is compared with.
        chat: How prompts become tokens.
        dtype: Number format of the weights.
        tolerance: Preference up to which rounding may decide (nats).
        revision: Of the model on the hub.
        trust_remote_code: Whether code of the model's may run.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.

    Raises:
        PatcherError: If answers part where rounding cannot decide.
        ConfigError: If the model cannot be loaded, or a back end cannot answer for it.
        DataError: If prompts cannot be read.
    """
    language_model = LanguageModel(
        path=model,
        chat=chat or ChatFormat(),
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    generation, other = generation or Generation(max_new_tokens=64), backend or Vllm()
    questions = prompts.questions()
    tokenizer = language_model.load_tokenizer()
    loaded = language_model.load_model().to(choose_device(device))  # type: ignore[arg-type]
    found = partings(
        *(loaded, tokenizer, language_model.chat),
        [question.messages for question in questions],
        generation,
        other,
    )
    first, second = type(generation.backend).__name__, type(other).__name__
    print(
        f"{len(questions) - len(found)} of {len(questions)} greedy answers are equal, token by token."
    )
    for parting in found:
        expected, other_token = (
            "its end" if token is None else repr(tokenizer.decode([token]))
            for token in (parting.expected, parting.found)
        )
        gap = (
            ""
            if parting.gap is None
            else f"; the model prefers {first}'s by {parting.gap:.4f} nats"
        )
        print(
            f"  {questions[parting.prompt].origin}, token {parting.position} of the answer: "
            f"{first} {expected}, {second} {other_token}{gap}"
        )
    # Logits that are no numbers explain nothing, either.
    wrong = [part for part in found if part.gap is None or not abs(part.gap) <= tolerance]
    if wrong:
        raise PatcherError(
            f"{len(wrong)} of {len(questions)} answers of {second} part from those of {first} by more "
            f"than `tolerance` {tolerance} nats; rounding does not explain that. Use {first}."
        )
