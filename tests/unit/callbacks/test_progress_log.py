"""What `fit` and `redteam` write into a log file while they work."""

import re

import pytest

from patcher_pl import progress
from patcher_pl.callbacks import ComputeBudget, ProgressLog
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.models import LanguageModel
from tests.commands import cli, sft_settings, write_inputs, write_yaml
from tests.tiny_runs import ATTACKER, Rows, adamw, fit


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Every step is worth a line."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(progress, "_BEAT_S", 3600.0)  # And nothing else is.


def test_a_fit_without_a_terminal_says_how_far_it_is(llama, tmp_path, capsys):
    """Wrong if a run on a cluster were silent for an hour."""
    rows = Rows(tmp_path)
    model = LanguageModel(path=str(llama))
    fit(SFT(model, optimizer=adamw()), rows.module(), 3, callbacks=[ProgressLog()])
    lines = [line for line in capsys.readouterr().out.splitlines() if "sft" in line]
    pattern = (
        r"sft, defender steps: {} of 3, loss \d+\.\d+, \d+ tokens/s, 0:00:\d+ so far, 0:00:\d+ left"
    )
    assert len(lines) == 3
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(pattern.format(number), line)


def test_a_run_that_ends_by_its_cost_counts_that(llama, tmp_path, capsys):
    rows = Rows(tmp_path)
    defense = Patcher(LanguageModel(path=str(llama)), ATTACKER, optimizer=adamw())
    fit(defense, rows.module(), -1, callbacks=[ProgressLog(), ComputeBudget(20)], max_epochs=-1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient" in line]
    assert lines
    assert all(re.match(r"patcher, gradient evaluations: \d+ of 20, loss", line) for line in lines)


def test_epochs_are_counted_in_steps(llama, tmp_path, capsys):
    rows = Rows(tmp_path)
    defense = SFT(LanguageModel(path=str(llama)), optimizer=adamw(), accumulate_grad_batches=2)
    fit(defense, rows.module(), -1, callbacks=[ProgressLog()], max_epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps" in line]
    assert re.match(r"sft, defender steps: 4 of 4, loss", lines[-1])


def test_the_commands_have_it(tmp_path):
    inputs = write_inputs(tmp_path)
    config = write_yaml(tmp_path / "config.yaml", sft_settings(inputs))
    said = cli("fit", "--config", config, "--run_dir", tmp_path / "run")
    said.expect(0)
    assert "sft, defender steps: 8 of 8, loss" in said.out
