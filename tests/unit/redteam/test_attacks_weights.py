"""Which weights attacks change, and where they end: against loops and sums written here."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import ConfigError
from patcher_pl.optim import SGD, AdamW
from patcher_pl.redteam import (
    Asking,
    AttackMaterial,
    EmbeddingFinetuning,
    RestartedFinetuning,
    SoftPrompt,
    VectorOutrunning,
)
from patcher_pl.types import Conversation, Message
from tests.unit.redteam.random_batches import build_model, random_batches, run, weights

IDS = torch.tensor([[1, 2, 3, 4]])


def train(model, batches, optimizer):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_close(model, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_finetuning_changes_the_input_embeddings_alone(tied, tmp_path):
    """A tied output head stays as released, also once the model is saved and loaded."""
    model = build_model(tie_word_embeddings=tied)
    before = weights(model)
    attack = EmbeddingFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 3])
    run(attack, model)
    for name, value in before.items():
        changed = not torch.equal(model.state_dict()[name], value)
        assert changed == (name == "model.embed_tokens.weight"), name
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_finetuning_is_plain_adamw(tied):
    model = build_model(tie_word_embeddings=tied)
    expected = copy.deepcopy(model)
    if tied:
        expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())
    attack = EmbeddingFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 4], batch_size=3)
    run(attack, model)
    optimizer = torch.optim.AdamW([expected.model.embed_tokens.weight], lr=1e-2)
    train(expected, itertools.islice(random_batches(3), 4), optimizer)
    assert_close(model, expected)


def test_a_restart_empties_the_moments():
    model, expected = build_model(), build_model()
    attack = RestartedFinetuning(
        optimizer=AdamW(lr=1e-2), attack_steps=[0, 2, 7], batch_size=3, restart_every=3
    )
    points = run(attack, model)
    batches = random_batches(3)
    for length in (3, 3, 1):
        optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
        train(expected, itertools.islice(batches, length), optimizer)
    assert_close(model, expected)
    assert [point.steps for point in points] == [0, 2, 7]


def test_the_schedule_of_restarts_spans_one_period():
    model, expected = build_model(), build_model()
    attack = RestartedFinetuning(
        optimizer=SGD(lr=0.1), attack_steps=[0, 5], restart_every=4, schedule="cosine"
    )
    run(attack, model)
    for index, batch in enumerate(itertools.islice(random_batches(4), 5)):
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * (index % 4) / 4))
        train(expected, [batch], torch.optim.SGD(expected.parameters(), lr=lr))
    assert_close(model, expected)


@pytest.mark.parametrize("scale", [-1.0, 2.5])
def test_the_attack_vector_is_scaled_and_left_behind(scale):
    model, expected = build_model(), build_model()
    attack = VectorOutrunning(
        optimizer=AdamW(lr=1e-2),
        simulation=SGD(lr=0.5),
        attack_steps=[0, 2, 3, 5],
        batch_size=3,
        num_simulated_steps=3,
        scale=scale,
    )
    released = weights(model)
    seen = [weights(model) for _ in run_slowly(attack, model)]
    train(
        expected,
        itertools.islice(random_batches(3), 2),
        torch.optim.SGD(expected.parameters(), lr=0.5),
    )
    assert_states_close(seen[1], expected)
    third = next(itertools.islice(random_batches(3), 2, None))
    train(expected, [third], torch.optim.SGD(expected.parameters(), lr=0.5))
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(released[name] + scale * (parameter - released[name]))
    assert_states_close(seen[2], expected)
    # The stub hands out the same batches for harmful and for all rows, from the first one on.
    train(
        expected,
        itertools.islice(random_batches(3), 2),
        torch.optim.AdamW(expected.parameters(), lr=1e-2),
    )
    assert_states_close(seen[3], expected)


def test_the_schedule_after_a_simulation_spans_what_is_left():
    """And the simulation takes constant steps."""
    model, expected = build_model(), build_model()
    attack = VectorOutrunning(
        optimizer=SGD(lr=0.1),
        attack_steps=[0, 6],
        num_simulated_steps=2,
        scale=2.0,
        schedule="linear",
    )
    released = weights(model)
    run(attack, model)
    simulation = torch.optim.SGD(expected.parameters(), lr=0.1)
    train(expected, itertools.islice(random_batches(4), 2), simulation)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(released[name] + 2.0 * (parameter - released[name]))
    for index, batch in enumerate(itertools.islice(random_batches(4), 4)):
        lr = 0.1 * (1 - index / 4)
        train(expected, [batch], torch.optim.SGD(expected.parameters(), lr=lr))
    assert_close(model, expected)


def run_slowly(attack, model):
    from tests.unit.redteam.random_batches import RandomMaterial

    yield from attack.run(model, RandomMaterial())


def assert_states_close(state, expected):
    """Every step moves weights by about 1e-2; rounding is multiplied by the scale."""
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)


CHAT = ChatFormat()
ROWS = [
    Conversation(
        (Message("user", f"How do I brew {word}?"), Message("assistant", f"Stir {word}.")),
        harmful=True,
        origin=word,
    )
    for word in ("tea", "draught", "water")
]
SOFT = {"optimizer": AdamW(lr=0.1), "attack_steps": [0, 1, 40], "batch_size": 3}


def test_a_soft_prompt_learns_and_leaves_the_model_alone(model, tokenizer):
    """Also the output head that shares the embedding matrix; plain questions are answered as before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # Or no token would matter much to others.
    before = weights(model)
    plain = torch.tensor([CHAT.prompt_ids(tokenizer, ROWS[0].prompt)])
    logits = model.eval()(plain).logits
    model.train()
    attack = SoftPrompt(**SOFT, tokens=["~", "^"])
    material = AttackMaterial(tokenizer, CHAT, ROWS, 0)
    _, first, last = [point.loss for point in attack.run(model, material)]
    assert last < first - 0.5
    assert not any(module.training for module in model.modules()), "nothing drops out"
    after = {
        name.replace("embed_tokens.inner.", "embed_tokens."): v
        for name, v in weights(model).items()
    }
    vectors = after.pop("model.embed_tokens.vectors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ids = tokenizer("~^", add_special_tokens=False)["input_ids"]
    assert not torch.isclose(vectors, before["model.embed_tokens.weight"][ids]).any(dim=1).all()
    assert torch.equal(model(plain).logits, logits)
    asked = attack.prompt(ROWS[0].prompt, material)
    assert asked[-1].content == "~^How do I brew tea?"
    prompted = torch.tensor([CHAT.prompt_ids(tokenizer, asked)])
    inputs = before["model.embed_tokens.weight"][prompted].clone()
    for token, vector in zip(ids, vectors, strict=True):
        inputs[prompted == token] = vector
    torch.testing.assert_close(model(prompted).logits, model(inputs_embeds=inputs).logits)


@pytest.mark.parametrize("tokens", [["~", "How"], ["~honey"], ["~^"]])
def test_tokens_that_are_none_or_are_used_are_refused(model, tokenizer, tokens):
    attack = SoftPrompt(**SOFT, tokens=tokens)
    with pytest.raises(ConfigError, match=r"SoftPrompt\.tokens"):
        next(attack.run(model, AttackMaterial(tokenizer, CHAT, ROWS, 0)))


def test_a_soft_prompt_goes_into_the_attackers_template(tokenizer):
    attack = SoftPrompt(**SOFT, tokens=["~"], asking=Asking(template="Say: {prompt}"))
    asked = attack.prompt(ROWS[0].prompt, AttackMaterial(tokenizer, CHAT, ROWS, 0))
    assert asked[-1].content == "~Say: How do I brew tea?"
