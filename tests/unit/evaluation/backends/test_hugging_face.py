"""Penalties and sampling cuts, against decoding by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from patcher_pl.evaluation.backends import Decoding, HuggingFace

PROMPTS = [[5, 9, 17, 21, 5, 30, 8], [40, 12], [7, 7, 33]]


@pytest.fixture(scope="module")
def model(llama):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        # Initial weights are so small that answers would ignore the prompt.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(30)
    return model


def decoding(**changed):
    settings = {
        **{"max_new_tokens": 8, "batch_size": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0},
        **{"repetition_penalty": 1.0, "seed": 0, "stop_ids": [], "pad_id": 0, "context": None},
    }
    return Decoding(**(settings | changed))


def by_hand(model, prompt, penalty, steps=8):
    """The most likely token, after logits of tokens seen before are made smaller."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            for token in set(ids):
                value = logits[token]
                logits[token] = value / penalty if value > 0 else value * penalty
            ids.append(max(range(len(logits)), key=logits.__getitem__))
    return ids[len(prompt) :]


def test_a_repetition_penalty_is_that_of_the_definition_in_a_padded_batch(model):
    """Wrong if padding counted as said before: answers would depend on their neighbors."""
    penalized = by_hand(model, PROMPTS[1], 1.7)
    # The worst case for padding: its token is one that the short prompt's answer wants.
    pad = penalized[0]
    found = HuggingFace().continuations(
        model, PROMPTS, decoding(repetition_penalty=1.7, pad_id=pad)
    )
    assert found == [by_hand(model, prompt, 1.7) for prompt in PROMPTS]
    plain = HuggingFace().continuations(model, PROMPTS, decoding(pad_id=pad))
    assert plain == [by_hand(model, prompt, 1.0) for prompt in PROMPTS]
    assert plain != found, "the test needs a penalty that matters"


def test_sampling_from_the_one_most_likely_token_is_greedy(model):
    """Wrong if top_k were ignored."""
    greedy = HuggingFace().continuations(model, PROMPTS, decoding())
    sampled = decoding(temperature=5.0, top_k=1)
    assert HuggingFace().continuations(model, PROMPTS, sampled) == greedy
    torch.manual_seed(0)
    loose = HuggingFace().continuations(model, PROMPTS, decoding(temperature=5.0, top_k=2))
    assert loose != greedy
