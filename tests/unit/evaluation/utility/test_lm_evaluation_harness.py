"""A task of our own through lm-evaluation-harness, offline; skipped where it is not installed."""

import json
import random
import sys
from importlib.util import find_spec

import numpy
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.utility import LmEval

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")

QUESTIONS = [
    {"question": "Tea is made of", "choices": [" leaves", " stones"], "label": 0},
    {"question": "A pancake is made of", "choices": [" sand", " flour"], "label": 1},
    {"question": "Honey is", "choices": [" salty", " sweet"], "label": 1},
]


@pytest.fixture
def task(tmp_path):
    """A folder with a multiple-choice task of three questions."""
    data = tmp_path / "kitchen.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    content = {
        "task": "kitchen",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "kitchen.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder)


@pytest.fixture
def tiny(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model, AutoTokenizer.from_pretrained(llama)


def accuracy_by_hand(model, tokenizer, questions):
    """The likelier choice, by the sum of its tokens' log-probabilities."""
    right = 0
    for row in questions:
        sums = []
        for choice in row["choices"]:
            before = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(row["question"] + choice)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(before), len(ids))
            sums.append(sum(float(log_probs[place - 1, ids[place]]) for place in places))
        right += sums.index(max(sums)) == row["label"]
    return right / len(questions)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # What the harness and its libraries warn of is not ours.
def test_a_task_is_scored_on_the_live_model_and_leaves_no_trace(tiny, task, monkeypatch, tmp_path):
    """Wrong if other weights were scored, or a probe in the middle of an attack changed it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    pad = tokenizer.pad_token
    # Before seeding: the check of types at run time draws from Python's generator.
    measure = LmEval(tasks=["kitchen"], include_path=task, include_defaults=False)
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    measure.prepare()
    found = measure.measure(model, tokenizer, ChatFormat(), seed=0)
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(after[0], states[0])
    assert after[1:] == states[1:]
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.pad_token == pad
    model.eval()
    expected = accuracy_by_hand(model, tokenizer, QUESTIONS)
    assert found == {"lm_eval/kitchen/acc": pytest.approx(expected)}
    limited = LmEval(
        tasks=["kitchen"], include_path=task, include_defaults=False, limit=1, label="short"
    )
    assert limited.measure(model, tokenizer, ChatFormat(), seed=0) == {
        "short/kitchen/acc": accuracy_by_hand(model, tokenizer, QUESTIONS[:1])
    }


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_named_before_the_first_attack(task):
    with pytest.raises(ConfigError, match="knows no 'kichten'"):
        LmEval(tasks=["kichten"], include_path=task, include_defaults=False).prepare()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(
        "patcher_pl.evaluation.utility.lm_evaluation_harness.find_spec", lambda name: None
    )
    with pytest.raises(ConfigError, match=r"pip install 'patcher-pl\[eval\]'"):
        LmEval(tasks=["arc_easy"]).prepare()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tasks", []), ("limit", 0), ("num_fewshot", -1), ("batch_size", 0)],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"LmEval\.{field} must be"):
        LmEval(**({"tasks": ["arc_easy"]} | {field: value}))
