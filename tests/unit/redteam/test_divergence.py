"""Attacks that diverge: measured as a collapsed model, however answers are drawn."""

from dataclasses import replace

import pytest
import torch

from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation import Generation
from patcher_pl.evaluation.backends import hugging_face, refillable
from patcher_pl.evaluation.judges import RefusalPhraseJudge
from patcher_pl.optim import SGD
from patcher_pl.redteam import FullFinetuning
from patcher_pl.types import Message

DRAWN = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "penalized": {"temperature": 1.0, "repetition_penalty": 1.05},
}


@pytest.fixture(params=["refilled", "generate"])
def backend(request, monkeypatch):
    """Both ways in which `HuggingFace` answers."""
    if request.param == "generate":
        monkeypatch.setattr(refillable, "can_refill", lambda model: False)
    return hugging_face.HuggingFace()


@pytest.mark.parametrize("settings", DRAWN.values(), ids=DRAWN)
def test_the_points_after_it_are_kept(model, tokenizer, red_team, backend, settings):
    """Wrong if an attack that wrecks the model ended with an error under sampling alone."""
    attack = FullFinetuning(optimizer=SGD(lr=1e38), attack_steps=[0, 2, 3])
    generation = Generation(max_new_tokens=6, backend=backend, **settings)
    judge = RefusalPhraseJudge()
    team = replace(red_team, attacks=[attack], generation=generation, judge=judge)
    (curve,) = team.run(model, tokenizer, ChatFormat(), defense="sft")
    assert curve.error is None
    assert curve.attack_steps == [0, 2, 3]
    assert curve.collapsed[1:] == [True, True]
    assert curve.coherent[1:] == curve.asr[1:] == [0.0, 0.0]
    assert {sample.answer for sample in curve.samples if sample.attack_steps} == {""}


@pytest.mark.parametrize("settings", DRAWN.values(), ids=DRAWN)
def test_one_broken_row_leaves_the_others_alone(model, tokenizer, backend, settings):
    """Wrong if one prompt on which the model overflows cost the answers to all others."""
    generation = Generation(max_new_tokens=6, batch_size=4, backend=backend, **settings)
    prompts = [[Message("user", f"How do I brew {name}?")] for name in ("tea", "zest")]
    broken = tokenizer("zest", add_special_tokens=False)["input_ids"][0]
    plain = generation.generate(model, tokenizer, ChatFormat(), prompts[:1])
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = torch.nan
    assert broken not in tokenizer("brew tea?")["input_ids"]
    good, bad = generation.generate(model, tokenizer, ChatFormat(), prompts)
    assert bad.text == ""
    assert bad.finished
    if settings.get("temperature", 0) == 0:
        assert good == plain[0]
    assert good.num_tokens > 1
