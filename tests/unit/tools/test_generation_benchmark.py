"""The benchmark of answers runs, and compares what it says that it compares."""

from dataclasses import replace

import pytest
import torch

from tools.throughput import generation
from tools.throughput.generation import PlannedStops, measure, own_answers, plain_answers
from tools.throughput.workload import END_ID, TINY

# With room for as many ranges of tokens as there are lengths.
SMALL = replace(TINY, vocab_size=256)


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(generation.SHAPES, "tiny", SMALL)


def test_both_sides_are_timed_on_the_same_answers(tiny_shape):
    found = measure(shape="tiny", num_prompts=9, batch_size=4, num_rounds=2, longest=16)
    assert found["same_answers"] == 1
    assert set(found["ratios"]) == {"generation", "generation_cpu"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    for side in ("plain", "ours"):
        assert found[side]["tokens_per_s"] > found[side]["prompts_per_s"] > 0


@pytest.mark.parametrize("answers", [plain_answers, own_answers])
def test_every_answer_is_as_long_as_planned_and_the_models_own(answers):
    """Wrong if a side were spared long answers, or all answers were the rule's and not the model's."""
    model = SMALL.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    stops = PlannedStops(SMALL.vocab_size, longest=16)
    lengths = [3, 16, 1, 7, 7]
    prompts = [[40, 9 + place, stops.last_prompt_token(n)] for place, n in enumerate(lengths)]
    handle = stops.attach(model)
    try:
        said = answers(model, prompts, 2, 16)
    finally:
        handle.remove()
    assert [len(answer) for answer in said] == lengths
    assert all(answer[-1] == END_ID for answer in said)
    assert said[3] != said[4], "the same plan, another prompt"
