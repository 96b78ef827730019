"""A tiny model and an attacker whose data are random tokens."""

import itertools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.redteam import AttackMaterial

CONFIG = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def build_model(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), **changes}))


def random_batches(batch_size):
    generator = torch.Generator().manual_seed(batch_size)
    for index in itertools.count():
        input_ids = torch.randint(1, 20, (batch_size, 7), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, 5 - index % 3 :] = 0
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :2] = -100
        yield {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class RandomMaterial(AttackMaterial):
    """Random token batches in place of conversations; every kind of rows has the same."""

    def __init__(self):
        pass

    def select(self, kind):
        return []

    def batches(self, batch_size, rows, asking=None):
        return random_batches(batch_size)


def run(attack, model):
    return list(attack.run(model, RandomMaterial()))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
