"""A lent model comes back as it was, whatever was done to it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from patcher_pl.models import Lora
from patcher_pl.models.blocks import untied_embeddings
from patcher_pl.models.lending import lent

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shape(model):
    """Everything about a model that is no weight."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        model.config.to_dict(),
    )


def with_adapters(model):
    adapted = Lora(rank=2).attach(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


def frozen_and_untied(model):
    untied_embeddings(model)
    model.requires_grad_(False)
    model.train()


def trained(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def hooked(model):
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    model.generation_config = None
    model.config.use_cache = False


@pytest.mark.parametrize("change", [with_adapters, frozen_and_untied, trained, hooked])
def test_whatever_is_done_is_undone(model, change):
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before, form, generation = state(model), shape(model), model.generation_config
    with lent(model) as target:
        assert target is model
        assert next(target.parameters()).grad is None
        change(target)
        assert shape(model) != form or any(
            not torch.equal(value, before[name]) for name, value in state(model).items()
        )
    assert shape(model) == form
    assert model.generation_config is generation
    assert torch.equal(first.grad, torch.ones_like(first))
    for name, value in state(model).items():
        assert torch.equal(value, before[name]), name


def test_also_after_an_error(model):
    before = state(model)
    with pytest.raises(RuntimeError, match="halfway"), lent(model):
        trained(model)
        raise RuntimeError("halfway")
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_hooks_that_were_there_can_still_be_taken_away(model):
    """Wrong if the way back gave modules other containers than handles know."""
    handle = model.register_forward_hook(lambda *_: None)
    with lent(model):
        model.register_forward_hook(lambda *_: None)
    assert len(model._forward_hooks) == 1
    handle.remove()
    assert not model._forward_hooks


def test_adapters_are_merged_meanwhile(model):
    """Wrong if an attacker were held to what the defense froze, or the adapters were lost."""
    plain = copy.deepcopy(model).double()
    adapted = Lora(rank=2).attach(model).double()
    with_b = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    for parameter in with_b:
        nn.init.normal_(parameter)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        said, released = adapted(ids).logits, plain(ids).logits
        before = state(adapted)
        with lent(adapted) as target:
            assert not [name for name, _ in target.named_parameters() if "lora" in name]
            torch.testing.assert_close(target(ids).logits, said)
        assert not torch.allclose(said, released)
        assert torch.equal(adapted(ids).logits, said)
    assert all(torch.equal(value, before[name]) for name, value in state(adapted).items())


def test_what_was_compiled_runs_as_it_is_written_and_is_compiled_again_afterwards(model):
    block = model.model.layers[0]
    block._compiled_call_impl = compiled = lambda *_, **__: 1 / 0
    with lent(model):
        model(torch.arange(4)[None])
    assert block._compiled_call_impl is compiled
    block._compiled_call_impl = None
