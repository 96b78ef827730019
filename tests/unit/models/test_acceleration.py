"""If these fail, `compile` and `liger` do nothing, or fail hours later and far from the setting."""

import shutil
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from patcher_pl.defenses import SFT, Patcher
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Adjoint, FirstOrder
from patcher_pl.hypergradients.hvp import FiniteDifference
from patcher_pl.models import LanguageModel
from patcher_pl.models.acceleration import accelerated
from patcher_pl.models.blocks import blocks_of
from tests.tiny_runs import ATTACKER, adamw, fit, load, snapshot


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, and how; nothing really is."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: calls.append((self, how)))
    return calls


def test_a_model_is_compiled_for_changing_lengths(llama, compiled):
    plain = load(llama)
    assert compiled == []
    model = load(llama, compile=True)
    assert compiled == [(block, {"dynamic": True}) for block in blocks_of(model)]
    assert len(compiled) > 1
    assert snapshot(model).keys() == snapshot(plain).keys()


def patcher(path, hypergradient=None, **options) -> Patcher:
    model = LanguageModel(path=str(path), **options)
    return Patcher(model, ATTACKER, optimizer=adamw(), hypergradient=hypergradient)


def test_second_derivatives_of_a_compiled_model_are_refused(llama, rows, compiled):
    with pytest.raises(ConfigError, match=r"LanguageModel\.compile: Adjoint as .* differentiates"):
        fit(patcher(llama, Adjoint(), compile=True), rows.module(), 1)
    for hypergradient in (FirstOrder(), Adjoint(hvp=FiniteDifference())):
        fit(patcher(llama, hypergradient, compile=True), rows.module(), 1)
    assert len(compiled) == 2 * len(blocks_of(load(llama)))


def test_liger_on_the_cpu_is_refused_before_training(llama, rows, monkeypatch):
    """Also where there is a GPU that the trainer does not use."""
    monkeypatch.setattr("patcher_pl.models.language_model.accelerated", lambda model, **_: model)
    with pytest.raises(ConfigError, match=r"LanguageModel\.liger: .* this run is on the CPU"):
        fit(patcher(llama, liger=True), rows.module(), 1)


def test_liger_that_is_not_there_says_where_it_comes_from(llama, monkeypatch):
    monkeypatch.setattr("patcher_pl.models.acceleration.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"LanguageModel\.liger.*patcher-pl\[gpu\]"):
        load(llama, liger=True)


def test_liger_without_a_gpu_is_refused(llama, monkeypatch):
    monkeypatch.setattr("patcher_pl.models.acceleration.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"LanguageModel\.liger.*torch finds none"):
        load(llama, liger=True)


def test_liger_leaves_the_loss_alone(llama, monkeypatch):
    """Its own loss would be skipped, and the logits with it."""
    calls = []
    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = lambda model, **how: calls.append((model, how))
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr("patcher_pl.models.acceleration.find_spec", lambda name: object())
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = accelerated(load(llama), compile_=False, liger=True)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert calls == [(model, off)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_as_it_did(llama, rows):
    found = []
    for compiled in (False, True):
        defense = SFT(LanguageModel(path=str(llama), compile=compiled), optimizer=adamw())
        fit(defense, rows.module(packing=True), 2)
        found.append(snapshot(defense.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4, msg=name)
