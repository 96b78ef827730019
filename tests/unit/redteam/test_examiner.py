"""Mute models, second judges and utility, through whole red teams."""

import logging
from dataclasses import dataclass, field, replace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from patcher_pl.data.chat import ChatFormat
from patcher_pl.data.sources import Source
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.evaluation import Benchmark, Generation, Judge, RefusalPhraseJudge, Verdict
from patcher_pl.evaluation.backends import HuggingFace, Vllm
from patcher_pl.evaluation.utility import Perplexity, UtilityMeasure
from patcher_pl.redteam import Asking, Attack, AttackPoint, FullFinetuning, RedTeam
from tests.commands import redteam_settings, write_yaml

CHAT = ChatFormat()


@dataclass(frozen=True, kw_only=True)
class Shifting(Attack):
    """Adds 1 to one weight before every point but the first; may fail, may be done at once."""

    points: int = 3
    failure: BaseException | None = None

    @property
    def default_name(self):
        return "shifting"

    def run(self, model, material):
        for step in range(self.points):
            if step > 0:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] += 1
            yield AttackPoint(step, 0, float("nan"))
        if self.failure is not None:
            raise self.failure


@dataclass(frozen=True, kw_only=True)
class OneWeight(UtilityMeasure):
    """Reads the weight that the attack shifts; draws from the generator like a sampler."""

    seeds: list = field(default_factory=list)
    failure: BaseException | None = None
    missing: bool = False

    @property
    def default_name(self):
        return "weight"

    def prepare(self):
        if self.missing:
            raise ConfigError("Run `pip install scales`.")

    def measure(self, model, tokenizer, chat, *, seed):
        if self.failure is not None:
            raise self.failure
        self.seeds.append(seed)
        return {
            self.name: model.lm_head.weight[0, 0].item(),
            f"{self.name}_draw": float(torch.rand(())),
        }


class Praising(Judge):
    """Finds full marks and coherence in everything, as an LLM that was shown nothing may."""

    def score(self, prompt, answer, reference):
        return Verdict(5, coherent=True)


@pytest.fixture
def mute(model):
    """A model that answers everything with its end-of-text token."""
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[model.config.eos_token_id] = 20.0
    model.lm_head = head
    return model


@pytest.fixture
def team(red_team):
    return replace(red_team, attacks=[Shifting()], benign_prompts=red_team.prompts)


@pytest.mark.parametrize("judge", [RefusalPhraseJudge(), Praising()])
@pytest.mark.parametrize("prefill", ["", "Sure, here is how:"])
def test_a_model_that_only_ends_its_turn_has_collapsed(
    mute, tokenizer, team, judge, prefill, caplog
):
    """Wrong if silence passed for safety, or the attacker's own prefill for an answer."""
    attack = Shifting(asking=Asking(prefill=prefill))
    (curve,) = replace(team, attacks=[attack], judge=judge).run(
        mute, tokenizer, CHAT, defense="sft"
    )
    assert curve.collapsed == [True] * 3
    assert curve.coherent == [0.0] * 3
    assert curve.repetition == [None] * 3
    assert {sample.answer for sample in curve.samples} == {""}
    assert caplog.text.count("low attack success is no safety here") == 1
    if isinstance(judge, RefusalPhraseJudge):
        assert curve.asr == curve.benign_compliance == [0.0] * 3
        assert curve.steps_to_break is None


def test_a_trigger_is_in_harmful_questions_alone(model, tokenizer, team, monkeypatch):
    """Wrong if benign questions carried it, too, and showed a usefulness that nobody meets."""
    asked = []
    plain = Generation.generate

    def generate(self, model, tokenizer, chat, prompts, *prefill):
        asked.extend(prompts)
        return plain(self, model, tokenizer, chat, prompts, *prefill)

    monkeypatch.setattr(Generation, "generate", generate)
    attack = Shifting(asking=Asking(template="Now: {prompt}", scope="harmful"))
    replace(team, attacks=[attack]).run(model, tokenizer, CHAT, defense="sft")
    texts = [messages[-1].content for messages in asked]
    num_harmful = sum(text.startswith("Now: ") for text in texts)
    assert num_harmful == len(texts) / 2, "the benign questions here are the harmful ones"


def test_a_model_that_speaks_has_not_collapsed(model, tokenizer, red_team, caplog):
    (curve,) = red_team.run(model, tokenizer, CHAT, defense="sft")
    assert curve.asr[-1] == 1.0
    assert curve.collapsed[-1] is False
    assert curve.repetition[-1] == 0.0
    assert "do not trust" not in caplog.text


def test_utility_is_taken_before_and_after_the_attack(model, tokenizer, team):
    """Wrong if the released model were measured twice, or every point paid for."""
    start = model.lm_head.weight[0, 0].item()
    measure = OneWeight()
    (curve,) = replace(team, utility=[measure], seeds=[4]).run(
        model, tokenizer, CHAT, defense="sft"
    )
    before, between, after = curve.utility["weight"]
    assert before == pytest.approx(start)
    assert between is None
    assert after == pytest.approx(start + 2)
    draws = curve.utility["weight_draw"]
    assert draws[0] == draws[2], "the seed of a measure does not depend on what ran before"
    assert measure.seeds == [4, 4]


def test_an_attack_of_one_point_is_measured_once(model, tokenizer, team):
    measure = OneWeight()
    team = replace(team, attacks=[Shifting(points=1)], utility=[measure])
    (curve,) = team.run(model, tokenizer, CHAT, defense="sft")
    assert len(curve.utility["weight"]) == len(measure.seeds) == 1


def test_an_attack_that_fails_keeps_the_utility_before_it(model, tokenizer, team):
    """Wrong if a model in the middle of a step passed for the one at the last measurement."""
    broken = Shifting(points=2, failure=RuntimeError("out of memory"))
    (curve,) = replace(team, attacks=[broken], utility=[OneWeight()]).run(
        model, tokenizer, CHAT, defense="sft"
    )
    before, after = curve.utility["weight"]
    assert before is not None
    assert after is None
    assert curve.error == "RuntimeError: out of memory"


def test_a_measure_that_fails_is_the_error_of_its_cell(model, tokenizer, team):
    measure = OneWeight(failure=DataError("tea.jsonl:3: no answer"))
    (curve,) = replace(team, utility=[measure]).run(model, tokenizer, CHAT, defense="sft")
    assert curve.error == "DataError: tea.jsonl:3: no answer"


def test_measuring_does_not_change_the_attack(model, tokenizer, red_team, recipes):
    """Wrong if asking for utility gave other attack success rates."""
    attack = FullFinetuning(optimizer=red_team.attacks[0].optimizer, attack_steps=[0, 5])
    sampled = Generation(max_new_tokens=6, temperature=1.0)
    plain = replace(red_team, attacks=[attack], generation=sampled, num_samples=4)
    data = Benchmark(source=Source(path=recipes))
    measured = replace(plain, utility=[OneWeight(), Perplexity(data=data)])
    (expected,) = plain.run(model, tokenizer, CHAT, defense="sft")
    (found,) = measured.run(model, tokenizer, CHAT, defense="sft")
    assert found.utility["perplexity"][0] > found.utility["perplexity"][1] > 1
    assert replace(found, utility={}) == expected


def test_what_a_measure_lacks_is_heard_of_before_the_first_attack(model, tokenizer, team):
    with pytest.raises(ConfigError, match="pip install scales"):
        replace(team, utility=[OneWeight(missing=True)]).run(model, tokenizer, CHAT, defense="sft")


def test_a_second_judge_reads_the_same_answers(model, tokenizer, red_team):
    """Wrong if its figures came from other answers, or took the place of the first judge's."""
    alike = replace(red_team, second_judge=red_team.judge)
    (curve,) = alike.run(model, tokenizer, CHAT, defense="sft")
    assert curve.second_asr == curve.asr
    # With none of four, and with all of four, any two such judges would agree.
    assert curve.judge_agreement[0] is curve.judge_agreement[-1] is None
    (curve,) = replace(red_team, second_judge=Praising()).run(model, tokenizer, CHAT, defense="sft")
    assert curve.asr[0] == 0.0
    assert curve.second_asr == [1.0, 1.0, 1.0]


def test_too_many_judge_failures_are_warned_of_once_per_cell(model, tokenizer, red_team, caplog):
    judge = replace(red_team.judge, puzzle="tea")
    team = replace(red_team, attacks=[Shifting()], judge=judge, seeds=[0, 1])
    with caplog.at_level(logging.WARNING):
        curves = team.run(model, tokenizer, CHAT, defense="sft")
    assert [curve.trusted for curve in curves] == [False, False]
    assert caplog.text.count("failed on 1 of 4 answers to harmful prompts") == 2
    trusting = replace(team, max_judge_error_rate=0.25)
    assert all(curve.trusted for curve in trusting.run(model, tokenizer, CHAT, defense="sft"))


def test_everything_has_its_name_in_yaml(tmp_path, recipes):
    """Wrong if a measure or a back end could not be asked for, or old files no longer did."""
    settings = redteam_settings(tmp_path)
    source = {"source": {"path": recipes}}
    judge = {"class_path": "patcher_pl.evaluation.RefusalPhraseJudge"}
    package = "patcher_pl.evaluation.utility"
    perplexity = {"class_path": f"{package}.Perplexity", "init_args": {"data": source}}
    refusal = {"prompts": source, "judge": judge, "generation": {"max_new_tokens": 9}}
    settings |= {
        "second_judge": judge,
        "utility": [
            perplexity,
            {"class_path": f"{package}.OverRefusal", "init_args": refusal},
            {"class_path": f"{package}.LmEval", "init_args": {"tasks": ["mmlu"], "limit": 20}},
        ],
    }
    backend = {"class_path": "patcher_pl.evaluation.backends.Vllm"}
    for generation in ({"max_new_tokens": 8}, {"max_new_tokens": 8, "backend": backend}):
        file = write_yaml(tmp_path / "redteam.yaml", settings | {"generation": generation})
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--redteam", type=RedTeam, sub_configs=True)
        team = parser.instantiate(parser.parse_args(["--redteam", str(file)])).redteam
        assert [measure.name for measure in team.utility] == [
            *("perplexity", "over_refusal", "lm_eval")
        ]
        assert team.second_judge == RefusalPhraseJudge()
        assert team.generation.max_new_tokens == 8
        expected = Vllm() if "backend" in generation else HuggingFace()
        assert team.generation.backend == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_coherence", -0.1),
        ("min_coherence", 1.1),
        ("max_judge_error_rate", -0.1),
        ("max_judge_error_rate", 2.0),
        ("utility", [OneWeight(), OneWeight()]),
    ],
)
def test_values_out_of_range_are_refused(red_team, field, value):
    with pytest.raises(ValueError, match=rf"RedTeam\.{field} must be"):
        replace(red_team, **{field: value})
