"""The judge in this process: a tiny model, and a back end that replies as scripted."""

import json
import pickle
import re
from dataclasses import dataclass

import pytest
from transformers import AutoTokenizer

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation import Generation, LocalJudge, Verdict
from patcher_pl.evaluation.backends import Backend
from patcher_pl.evaluation.judges import local
from patcher_pl.models import LanguageModel
from patcher_pl.reports.settings import as_settings
from tests.families import build_family

REPLIES = {
    "Stir it.": ('{"score": 5, "coherent": true}', Verdict(5, coherent=True)),
    "I won't.": ('Well: {"score": 1, "coherent": true}', Verdict(1, coherent=True)),
    "petal petal": ("Score: 1", Verdict(1, coherent=True)),
    "Mist rises.": ('{"score": 2, "coherent": false}', Verdict(2, coherent=False)),
    "Ask again.": ("No idea.", Verdict(None, False, "no score in the reply 'No idea.'")),
}


@dataclass(frozen=True, kw_only=True)
class Scripted(Backend):
    """Replies to the answer that a prompt holds; reads it with the tokenizer at `path`."""

    path: str

    def continuations(self, model, prompts, decoding):
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        replies = []
        for prompt in prompts:
            text = tokenizer.decode(prompt)
            answer = re.search(r"BEGIN ANSWER (\w+)\n(.*)\nEND ANSWER \1", text)[2]
            said = tokenizer(REPLIES[answer][0], add_special_tokens=False)["input_ids"]
            replies.append([*said, decoding.stop_ids[0]])
        return replies


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama with room for the rubric."""
    directory = build_family("llama", tmp_path_factory.mktemp("judge") / "llama")
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def judge(directory, monkeypatch):
    """Replies as scripted, and counts how often its model is loaded."""
    monkeypatch.setattr(local, "_loaded", {})
    plain = LanguageModel.load_model

    def load_model(self):
        loads.append(self.path)
        return plain(self)

    loads = []
    monkeypatch.setattr(LanguageModel, "load_model", load_model)
    built = LocalJudge(
        language_model=LanguageModel(path=str(directory)),
        generation=Generation(max_new_tokens=60, backend=Scripted(path=str(directory))),
        device="cpu",
    )
    return built, loads


def test_replies_become_verdicts_in_order(judge):
    """Wrong if a batch mixed answers up, or a reply that is no verdict were scored."""
    judge, loads = judge
    answers = [*REPLIES, "Stir it.", "<think>Hm.</think>Stir it.", "", "<think>never ends"]
    verdicts = judge.score_all(["How?"] * len(answers), answers, [None] * len(answers))
    silent = Verdict(1, coherent=False)
    expected = [verdict for _, verdict in REPLIES.values()]
    assert verdicts == [*expected, expected[0], expected[0], silent, silent]
    assert judge.score("Why?", "I won't.", "Because.") == expected[1]
    assert len(loads) == 1, "one process loads the judge once"


def test_a_question_without_room_in_the_context_is_an_error_for_it_alone(judge):
    judge, _ = judge
    prompts = ["How? " * 2000, "How?"]
    verdicts = judge.score_all(prompts, ["Stir it."] * 2, [None] * 2)
    assert verdicts[0] == Verdict(None, False, "too long for the judge's context")
    assert verdicts[1].score == 5


def test_the_judge_travels_without_its_weights(judge):
    judge, _ = judge
    judge.score("How?", "Stir it.", None)
    assert len(pickle.dumps(judge)) < 5000
    assert pickle.loads(pickle.dumps(judge)) == judge
    assert as_settings(judge)["init_args"]["device"] == "cpu"


def test_nothing_to_judge_loads_nothing(judge):
    judge, loads = judge
    assert judge.score_all([], [], []) == []
    assert judge.score("How?", "", None) == Verdict(1, coherent=False)
    assert not loads


def test_a_missing_model_is_named(tmp_path):
    judge = LocalJudge(language_model=LanguageModel(path=str(tmp_path / "nowhere")), device="cpu")
    with pytest.raises(ConfigError, match=r"LanguageModel\.path: .*nowhere"):
        judge.score("How?", "Stir it.", None)
