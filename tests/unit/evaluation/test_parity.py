"""Two back ends are compared token by token, and every parting is weighed by the model itself."""

import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.cli.parity import run_parity
from patcher_pl.data import ChatFormat, Source
from patcher_pl.errors import PatcherError
from patcher_pl.evaluation import Benchmark, Generation
from patcher_pl.evaluation.backends import Backend, HuggingFace
from patcher_pl.evaluation.parity import Parting, partings
from patcher_pl.types import Message

CHAT = ChatFormat()
PROMPTS = [[Message("user", text)] for text in ("How do I brew tea?", "And cake?", "Soup?")]


@dataclass(frozen=True, kw_only=True)
class Changed(Backend):
    """Hugging Face's answers; that of one prompt gets another token at one place."""

    prompt: int = 1
    position: int = 2
    token: int | None = 7

    def continuations(self, model, prompts, decoding):
        found = HuggingFace().continuations(model, prompts, decoding)
        ids = found[self.prompt]
        kept = ids[: self.position]
        found[self.prompt] = (
            kept if self.token is None else [*kept, self.token, *ids[len(kept) + 1 :]]
        )
        return found


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


GENERATION = Generation(max_new_tokens=6, temperature=0.9)


def test_equal_answers_do_not_part(model, tokenizer):
    """Wrong if answers were sampled: draws of two back ends differ."""
    assert partings(model, tokenizer, CHAT, PROMPTS, GENERATION, HuggingFace()) == []


def test_a_parting_says_where_and_how_much_the_model_minds(model, tokenizer):
    (found,) = partings(model, tokenizer, CHAT, PROMPTS, GENERATION, Changed())
    greedy = Generation(max_new_tokens=6)
    asked, answers = greedy.tokens(model, tokenizer, CHAT, PROMPTS)
    assert (found.prompt, found.position, found.found) == (1, 2, 7)
    assert found.expected == answers[1][2]
    with torch.no_grad():
        read = torch.tensor([[*asked[1], *answers[1][:2]]])
        known = model(read).logits[0, -1].log_softmax(-1)
    assert found.gap == pytest.approx((known[found.expected] - known[7]).item(), abs=1e-4)
    assert found.gap > 0


def test_an_answer_that_is_cut_short_parts_at_its_end(model, tokenizer):
    (found,) = partings(model, tokenizer, CHAT, PROMPTS, GENERATION, Changed(token=None))
    assert (found.position, found.found, found.gap) == (2, None, None)


@pytest.mark.parametrize(("backend", "tolerance"), [(HuggingFace(), 0.0), (Changed(), 100.0)])
def test_the_command_accepts_what_rounding_explains(backend, tolerance, llama, questions, capsys):
    run_parity(str(llama), questions, backend, GENERATION, tolerance=tolerance, device="cpu")
    shown = capsys.readouterr().out
    assert f"{3 if tolerance == 0 else 2} of 3 greedy answers are equal" in shown


def test_the_command_ends_with_an_error_where_it_does_not(llama, questions, capsys):
    told = r"1 of 3 answers of Changed part .* by more than `tolerance` 1e-06"
    with pytest.raises(PatcherError, match=told):
        run_parity(str(llama), questions, Changed(), GENERATION, tolerance=1e-6, device="cpu")
    assert "prompts.jsonl:2" in capsys.readouterr().out


def test_logits_that_are_no_numbers_are_no_rounding(llama, questions, monkeypatch):
    found = [Parting(prompt=0, position=1, expected=3, found=4, gap=float("nan"))]
    monkeypatch.setattr("patcher_pl.cli.parity.partings", lambda *_: found)
    with pytest.raises(PatcherError, match="1 of 3 answers"):
        run_parity(str(llama), questions, HuggingFace(), GENERATION, device="cpu")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt[0].content, "response": "Stir."} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Benchmark(source=Source(path=str(path)))
