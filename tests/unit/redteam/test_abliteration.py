"""Abliteration against directions and projections computed here, by the models' own names."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from patcher_pl.data.chat import ChatFormat
from patcher_pl.errors import DataError, PatcherError
from patcher_pl.redteam import Abliteration, Asking, AttackMaterial
from patcher_pl.types import Conversation, Message

CHAT = ChatFormat()
ROWS = [
    Conversation(
        (
            Message("user", f"{'How do I brew' if harmful else 'What goes into'} {word}?"),
            Message("assistant", f"Stir {word}, then wait." if harmful else f"Add {word}."),
        ),
        harmful=harmful,
        origin=word,
    )
    for word in ("tea", "a sweet draught", "water", "honey", "a bitter moonroot potion")
    for harmful in (True, False)
]
# By name: matrices with their outputs first, and those with their outputs last.
WRITERS = {
    "llama": (("self_attn.o_proj.weight", "mlp.down_proj.weight"), ("embed_tokens.weight",)),
    "gpt2": ((), ("attn.c_proj.weight", "mlp.c_proj.weight", "wte.weight", "wpe.weight")),
}
BIASES = ("attn.c_proj.bias", "mlp.c_proj.bias")


def build(directory, num_layers=2, scale=1.0, **changes):
    sizes = {"num_hidden_layers": num_layers, "n_layer": num_layers}
    config = AutoConfig.from_pretrained(directory, **changes)
    for name in sizes:
        if name in config.to_dict():
            setattr(config, name, num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1:  # Or blocks would hardly change the stream.
                parameter.data.mul_(scale)
    return model


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return request.param


@pytest.fixture
def directory(family, request):
    return request.getfixturevalue(family)


@pytest.fixture
def material(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AttackMaterial(tokenizer, CHAT, ROWS, 0)


def blocks(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def block_outputs(model, ids):
    """The residual stream before the first block and after every block."""
    found = []
    handles = [
        blocks(model)[0].register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        *(
            block.register_forward_hook(lambda _, __, out: found.append(out))
            for block in blocks(model)
        ),
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [out[0] if isinstance(out, tuple) else out for out in found]


def prompt_ids(material, harmful):
    rows = [row for row in material.rows if row.harmful == harmful]
    return [CHAT.prompt_ids(material.tokenizer, row.prompt) for row in rows]


def directions_by_hand(model, material):
    """One prompt at a time, so without padding."""
    means = []
    for harmful in (True, False):
        lasts = [
            torch.stack([out[0, -1] for out in block_outputs(model, ids)[1:]])
            for ids in prompt_ids(material, harmful)
        ]
        means.append(torch.stack(lasts).mean(dim=0))
    difference = means[0] - means[1]
    return difference / difference.norm(dim=-1, keepdim=True)


def layer_of(name):
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def by_hand(model, family, directions):
    """Orthogonalizes by name, each layer by its own direction."""
    first, last = WRITERS[family]
    edited = copy.deepcopy(model)
    head = edited.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, weight in edited.named_parameters():
            r = directions[layer_of(name)]
            if name.endswith(first):
                weight.copy_(weight - torch.outer(r, r @ weight))
            elif name.endswith((*last, *BIASES)):
                weight.copy_(weight - (weight @ r).unsqueeze(-1) * r)
    return edited


def loss(model, material):
    """Of the attacker's harmful answers, one row at a time."""
    total = count = 0
    for row in material.rows:
        if row.harmful:
            one = CHAT.encode(material.tokenizer, row)
            ids, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            total += nn.functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum", ignore_index=-100
            ).item()
            count += int((labels != -100).sum())
    return total / count


def best_by_hand(model, family, material):
    """The direction whose removal makes the answers likeliest, and the model without it."""
    directions = directions_by_hand(model, material)
    edits = [by_hand(model, family, r.expand_as(directions)) for r in directions]
    losses = [loss(edited, material) for edited in edits]
    assert len(set(losses)) == len(losses)
    best = losses.index(min(losses))
    return directions[best], edits[best]


def assert_states_close(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_no_matrix_writes_along_the_direction_and_the_rest_stays(directory, family, material, tied):
    model = build(directory, tie_word_embeddings=tied)
    released = copy.deepcopy(model)
    r, _ = best_by_hand(model, family, material)
    list(Abliteration().run(model, material))
    first, last = WRITERS[family]
    num_writers = 0
    for name, weight in model.named_parameters():
        before = dict(released.named_parameters()).get(name)
        if name.endswith(first):
            component = (r @ weight).abs().max()
        elif name.endswith((*last, *BIASES)):
            component = (weight @ r).abs().max()
        else:
            before = released.get_output_embeddings().weight if before is None else before
            assert torch.equal(weight, before), name
            continue
        num_writers += 1
        assert component < 1e-6, name
        assert not torch.equal(weight, before), name
    assert num_writers == {"llama": 5, "gpt2": 10}[family]


def test_nothing_of_the_direction_is_left_in_the_activations(directory, family, material):
    model = build(directory)
    r, _ = best_by_hand(model, family, material)
    ids = CHAT.prompt_ids(material.tokenizer, (Message("user", "And a sweet one, not read?"),))
    before = [(out @ r).abs().max() for out in block_outputs(model, ids)]
    list(Abliteration().run(model, material))
    after = [(out @ r).abs().max() for out in block_outputs(model, ids)]
    assert min(before) > 1e-3
    assert max(after) < 1e-6
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_each_layer_can_have_its_own_direction(directory, family, material):
    model = build(directory, num_layers=3, scale=5.0)
    directions = directions_by_hand(model, material)
    assert (directions[0] @ directions[2]).abs() < 0.99
    expected = by_hand(model, family, directions)
    list(Abliteration(per_layer=True).run(model, material))
    assert_states_close(model, expected)


def test_the_chosen_direction_makes_the_harmful_answers_likeliest(directory, family, material):
    model = build(directory, num_layers=6, scale=5.0)
    _, expected = best_by_hand(model, family, material)
    list(Abliteration().run(model, material))
    assert_states_close(model, expected)


def test_what_is_read_is_counted(directory, material):
    model = build(directory)
    (point,) = Abliteration(num_prompts=3).run(model, material)
    harmful, benign = (prompt_ids(material, kind)[:3] for kind in (True, False))
    rows = [row for row in ROWS if row.harmful][:3]
    answers = [CHAT.encode(material.tokenizer, row).input_ids for row in rows]
    # Prompts once for the direction, harmful ones before and after; answers once per block.
    expected = sum(map(len, harmful)) * 3 + sum(map(len, benign)) + sum(map(len, answers)) * 2
    assert point.num_tokens == expected
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert point.flops == 2.0 * expected * num_weights


def test_the_attackers_words_are_used(directory, material):
    first, other = build(directory), build(directory)
    list(Abliteration().run(first, material))
    list(Abliteration(asking=Asking(template="Say: {prompt}")).run(other, material))
    assert any(
        not torch.equal(value, other.state_dict()[name])
        for name, value in first.state_dict().items()
    )


class Doubled(nn.Module):
    """A layer whose output is no linear layer's output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def test_a_model_that_writes_in_another_way_is_refused(directory, material):
    """Wrong if a defense seemed to withstand an abliteration that did not happen."""
    model = build(directory)
    blocks(model)[1].mlp = Doubled(blocks(model)[1].mlp)
    with pytest.raises(PatcherError, match="block 1 still writes along the direction"):
        list(Abliteration().run(model, material))
    with pytest.raises(PatcherError, match="linear layers that write to it in block 1"):
        for name in ("self_attn", "attn"):
            if hasattr(blocks(model)[1], name):
                blocks(model)[1].register_module(name, Tupled(getattr(blocks(model)[1], name)))
        list(Abliteration().run(model, material))


class Tupled(Doubled):
    def forward(self, *args, **kwargs):
        first, *rest = self.inner(*args, **kwargs)
        return (2 * first, *rest)


def test_a_model_without_blocks_is_refused(directory, material):
    model = build(directory)
    model.config.num_hidden_layers = 7
    with pytest.raises(PatcherError, match="no list of 7 blocks"):
        list(Abliteration().run(model, material))


def test_both_kinds_of_prompts_are_needed_and_must_differ(directory, material):
    model = build(directory)
    harmful = [row for row in ROWS if row.harmful]
    for rows, problem in (
        (harmful, "needs benign rows"),
        (
            [*harmful, *(Conversation(row.messages, False, row.origin) for row in harmful)],
            "the same",
        ),
    ):
        with pytest.raises(DataError, match=problem):
            list(Abliteration().run(model, AttackMaterial(material.tokenizer, CHAT, rows, 0)))
