"""Models that read less than `ChatFormat.max_length`: everywhere, the smaller of both holds."""

import json
from dataclasses import replace

import pytest
import torch

from patcher_pl.data.mixing import Mixture
from patcher_pl.data.sources import Source
from patcher_pl.errors import ConfigError, DataError
from patcher_pl.evaluation import Benchmark, Generation
from patcher_pl.evaluation.backends.base import Decoding
from patcher_pl.evaluation.backends.hugging_face import continued_by_generate
from patcher_pl.models import LanguageModel
from patcher_pl.models.context import context_length
from patcher_pl.models.packing import require_packing
from patcher_pl.optim import AdamW
from patcher_pl.redteam import Abliteration, FullFinetuning, RedTeam, SoftPrompt
from patcher_pl.redteam.asking import Asking
from patcher_pl.redteam.room import require_room
from tests.commands import (
    Witness,
    cli,
    patcher_settings,
    redteam_settings,
    write_inputs,
    write_rows,
    write_yaml,
)
from tests.red_team_parts import ExactJudge

CONTEXT = 48


def shortened(directory):
    """Cuts the positions of a tiny GPT-2 to `CONTEXT`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.n_positions = CONTEXT
    positions = model.transformer.wpe
    positions.weight = torch.nn.Parameter(positions.weight[:CONTEXT].clone())
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What a user brings along: a model that reads 48 tokens, and longer rows."""
    folder = write_inputs(tmp_path_factory.mktemp("short"), "gpt2")
    shortened(folder / "model")
    for name in ("safe", "unsafe"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for row in rows[::2]:
            row["response"] = " ".join(["Stir two petals into warm water."] * 12)
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def language_model(inputs):
    return LanguageModel(path=str(inputs / "model"))


@pytest.fixture
def team(inputs):
    source = Source(path=str(inputs / "unsafe.jsonl"), harmful=True)
    return RedTeam(
        attacks=[FullFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0, 1])],
        data=Mixture(sources=[source]),
        prompts=Benchmark(source=source, limit=2),
        judge=ExactJudge(),
        generation=Generation(max_new_tokens=4),
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_training_and_its_attacks_stay_within(inputs, tmp_path, packing):
    """Wrong if it ended in an IndexError, or rows longer than the model reads were trained on."""
    settings = patcher_settings(inputs)
    settings["data"]["packing"] = packing
    settings["trainer"]["max_steps"] = 4
    settings["trainer"]["callbacks"] = [{"class_path": "tests.commands.Witness"}]
    settings["redteam"] = {**redteam_settings(inputs), "packing": packing}
    config = write_yaml(tmp_path / "fit.yaml", settings)
    Witness.modules.clear()
    outcome = cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    data = Witness.modules.pop().trainer.datamodule
    for stream in (data.train_dataloader(), data.attack_stream()):
        lengths = [len(row.input_ids) for row in stream._examples]
        assert max(lengths) == CONTEXT
    assert "11 lose the end of their last answer (at most 48 tokens" in " ".join(
        outcome.out.split()
    )
    curves = json.loads((tmp_path / "run" / "results.json").read_text())["curves"]
    assert [curve["error"] for curve in curves] == [None]
    assert curves[0]["attack_steps"] == [0, 2]


def test_prompts_that_are_too_long_are_heard_of_before_the_first_attack(
    inputs, tmp_path, language_model, team
):
    """Wrong if each cell failed with the same sentence after its attack, with exit code 0."""
    long = [{"prompt": "Stir two petals into warm water. " * 9}, {"prompt": "Brew it."}]
    path = write_rows(tmp_path / "prompts.jsonl", [{**row, "response": "No."} for row in long])
    settings = redteam_settings(inputs)
    settings["prompts"] = {"source": {"path": str(path), "harmful": True}}
    attack = {"model": str(inputs / "model"), "redteam": settings, "device": "cpu"}
    config = write_yaml(tmp_path / "attack.yaml", attack)
    outcome = cli("redteam", "--config", config, "--run_dir", tmp_path / "run").expect(2)
    assert "reads at most 48" in outcome.err
    assert "1 of 2 prompts" in outcome.err
    assert not (tmp_path / "run" / "cells").exists()
    fit = write_yaml(tmp_path / "fit.yaml", {**patcher_settings(inputs), "redteam": settings})
    outcome = cli("fit", "--config", fit, "--run_dir", tmp_path / "fit").expect(2)
    assert "reads at most 48" in outcome.err
    assert not (tmp_path / "fit").exists() or not list((tmp_path / "fit").rglob("*.ckpt"))


@pytest.mark.parametrize(
    "change",
    [
        {"asking": Asking(template="Stir two petals into warm water. " * 9 + "{prompt}")},
        {"asking": Asking(prefill="Stir two petals into warm water. " * 9)},
    ],
    ids=["template", "prefill"],
)
def test_an_attack_may_make_them_too_long(language_model, team, change):
    attacks = [*team.attacks, replace(team.attacks[0], label="wordy", **change)]
    with pytest.raises(DataError, match=r"2 of 2 prompts, as wordy words them"):
        require_room(replace(team, attacks=attacks), language_model)


def test_tokens_of_a_soft_prompt_take_room(language_model, team):
    names = [f"token{number}" for number in range(40)]
    attack = SoftPrompt(optimizer=AdamW(lr=1e-3), attack_steps=[0], tokens=names)
    with pytest.raises(DataError, match="as soft_prompt_adamw words them"):
        require_room(replace(team, attacks=[attack]), language_model)


def test_answers_with_less_room_are_counted(language_model, team, caplog):
    require_room(team, language_model)
    assert "room for fewer" not in caplog.text
    wordy = replace(team, generation=Generation(max_new_tokens=40))
    require_room(wordy, language_model)
    assert "reads 48 tokens, so that 2 of 2 answers have room for fewer" in caplog.text


def test_prompts_of_abliteration_that_are_too_long_are_left_out(inputs, tmp_path, team, caplog):
    rows = [{"prompt": f"{'Stir two petals. ' * (9 * (n % 2))} Brew {n}"} for n in range(4)]
    files = [
        write_rows(tmp_path / f"{kind}.jsonl", [{**row, "response": kind} for row in rows])
        for kind in ("harmful", "benign")
    ]
    sources = [Source(path=str(file), harmful=file.stem == "harmful") for file in files]
    data = Mixture(sources=sources, poison_ratio=0.5)
    language_model = LanguageModel(path=str(inputs / "model"))
    team = replace(team, attacks=[Abliteration(per_layer=True)], data=data)
    (curve,) = team.run(
        *(language_model.load_model(), language_model.load_tokenizer(), language_model.chat),
        defense="sft",
    )
    assert "leaves 2 of 4 prompts out" in caplog.text
    assert "IndexError" not in (curve.error or "")


def test_a_long_prompt_does_not_shorten_the_answers_of_others(language_model):
    """Wrong if how long an answer may be depended on what was asked beside it."""
    model = language_model.load_model()
    prompts = [list(range(60, 64)), list(range(60, 105))]
    settings = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 0}
    decoding = Decoding(
        max_new_tokens=10, batch_size=2, stop_ids=[], pad_id=0, context=CONTEXT, **settings
    )
    answers = continued_by_generate(model, prompts, decoding)
    assert [len(answer) for answer in answers] == [10, 3]


@pytest.mark.parametrize(
    ("name", "sizes", "length"),
    [
        ("LlamaConfig", {"max_position_embeddings": 33}, 33),
        ("GPT2Config", {"n_positions": 33}, 33),
        ("MptConfig", {"max_seq_len": 33}, 33),
        ("OpenAIGPTConfig", {"n_positions": 33}, 33),
        ("MambaConfig", {}, None),
        ("Gemma3Config", {"text_config": {"max_position_embeddings": 33}}, 33),
    ],
)
def test_what_configurations_call_it(name, sizes, length):
    import transformers

    assert context_length(getattr(transformers, name)(**sizes)) == length


def test_a_mask_of_one_conversation_s_length_is_refused_for_packed_rows():
    """Wrong if GPT-Neo passed a check on short rows and broke on longer ones."""
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    config = GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    rows = [list(range(20)), list(range(20))]
    with pytest.raises(ConfigError, match="keeps an attention mask of 32 tokens"):
        require_packing(model, rows, torch.device("cpu"), "data.packing")
