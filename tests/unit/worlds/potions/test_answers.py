"""The testbed is asked through a batch that is refilled; its answers are those of `generate`."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation import Generation
from patcher_pl.evaluation.backends import HuggingFace, hugging_face
from patcher_pl.evaluation.backends.refillable import can_refill
from patcher_pl.shipped import TESTBED
from patcher_pl.types import Message
from patcher_pl.worlds.potions.world import files


class Generate(HuggingFace):
    """Answers through transformers alone, batch by batch."""

    def continuations(self, model, prompts, decoding):
        return hugging_face.continued_by_generate(model, prompts, decoding)


def test_answers_are_those_of_generate():
    """Wrong if results on the testbed depended on how its answers are computed."""
    model = AutoModelForCausalLM.from_pretrained(TESTBED / "model")
    tokenizer = AutoTokenizer.from_pretrained(TESTBED / "model")
    asked = sorted({row.prompt for rows in files().values() for row in rows})[::150]
    prompts = [[Message("user", prompt)] for prompt in asked]
    assert can_refill(model)
    ours, plain = (
        Generation(max_new_tokens=28, batch_size=batch_size, backend=backend).generate(
            model, tokenizer, ChatFormat(), prompts
        )
        for batch_size, backend in ((16, HuggingFace()), (256, Generate()))
    )
    assert ours == plain
    assert len({answer.text for answer in ours}) > 1
