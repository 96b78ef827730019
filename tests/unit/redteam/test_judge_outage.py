"""A judge that is out of order: what was measured is kept, and judged by the next run."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.evaluation import Judge, LlmJudge, Verdict
from patcher_pl.evaluation.utility import OverRefusal
from patcher_pl.optim import AdamW
from patcher_pl.redteam import FullFinetuning
from patcher_pl.redteam.red_team import Campaign
from patcher_pl.reports import Results
from tests.chat_server import serving


@dataclass(frozen=True, kw_only=True)
class Moody(Judge):
    """Says what a file says: how many more answers it judges before it fails, and how it fails."""

    mood: str

    def score(self, prompt, answer, reference):
        """See `Judge.score`."""
        mood = Path(self.mood)
        num_left, how = mood.read_text().split()
        if int(num_left) > 0:
            mood.write_text(f"{int(num_left) - 1} {how}")
            return Verdict(1 + len(answer) % 5, coherent=bool(answer))
        if how == "refused":
            raise ConfigError("The key is refused.")
        return Verdict(None, coherent=False, error="no connection")


@pytest.fixture
def team(red_team):
    attack = FullFinetuning(optimizer=AdamW(lr=1e-2), attack_steps=[0, 1, 3], label="first")
    return replace(red_team, attacks=[attack], benign_prompts=red_team.prompts)


@pytest.fixture
def no_attack(monkeypatch):
    """From now on, an attack is an error."""

    def switch():
        def attack(*_):
            raise AssertionError("attacked again")

        monkeypatch.setattr(Campaign, "attack", attack)

    return switch


def curves(directory):
    return [replace(curve, judge_errors=[]) for curve in Results.load(directory).curves]


@pytest.mark.parametrize("num_judged", [0, 3, 11])
def test_the_next_run_judges_what_was_not_judged_and_attacks_nothing(
    model_dir, team, tmp_path, num_judged, no_attack
):
    """Wrong if "1 done already" stood for ever behind a curve of which nothing was scored."""
    mood = tmp_path / "mood"
    judge = Moody(mood=str(mood))
    measure = OverRefusal(prompts=team.prompts, judge=judge, generation=team.generation)
    team = replace(team, judge=judge, second_judge=judge, utility=[measure])
    mood.write_text("1000 fine")
    run_redteam(team, tmp_path / "whole", str(model_dir), device="cpu")
    mood.write_text(f"{num_judged} silent")
    with pytest.raises(PatcherError, match="The answers are kept"):
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    (curve,) = Results.load(tmp_path / "run" / "results.json").curves
    assert sum(curve.judge_errors)
    assert not curve.trusted
    no_attack()
    mood.write_text("1000 fine")
    run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    found = curves(tmp_path / "run" / "results.json")
    assert found == curves(tmp_path / "whole" / "results.json")
    assert found[0].trusted
    left = 1000 - int(mood.read_text().split()[0])
    # Harmful, benign and second at three points, and the utility before and after: 4 answers each.
    assert left == 4 * (3 * 3 + 2) - num_judged, "what was judged must not be paid for twice"
    (cell,) = (tmp_path / "run" / "cells").rglob("*.json")
    assert "unjudged" not in json.loads(cell.read_text()), "answers stay no longer than needed"
    mood.write_text("0 silent")
    run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")


def test_a_few_missing_verdicts_are_judged_too_and_are_no_failure(
    model_dir, team, tmp_path, no_attack
):
    mood = tmp_path / "mood"
    mood.write_text("23 silent")
    team = replace(team, judge=Moody(mood=str(mood)))
    (curve,) = run_redteam(team, tmp_path / "run", str(model_dir), device="cpu").curves
    assert curve.judge_errors == [0, 0, 1]
    no_attack()
    mood.write_text("1 silent")
    (curve,) = run_redteam(team, tmp_path / "run", str(model_dir), device="cpu").curves
    assert curve.judge_errors == [0, 0, 0]


def test_a_judge_that_is_refused_during_an_attack_does_not_cost_the_attack(
    model_dir, team, tmp_path, no_attack
):
    """Wrong if an expired key threw away what took a night."""
    mood = tmp_path / "mood"
    mood.write_text("9 refused")
    team = replace(team, judge=Moody(mood=str(mood)))
    with pytest.raises(ConfigError, match="The key is refused"):
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    (curve,) = Results.load(tmp_path / "run" / "results.json").curves
    assert curve.attack_steps == [0, 1, 3]
    assert curve.asr[0] is not None
    assert curve.asr[1:] == [None, None]
    no_attack()
    with pytest.raises(ConfigError, match="The key is refused"):
        mood.write_text("0 refused")
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    mood.write_text("1000 fine")
    (curve,) = run_redteam(team, tmp_path / "run", str(model_dir), device="cpu").curves
    assert None not in curve.asr


def test_a_judge_that_is_refused_at_once_stops_before_anything_is_lost(model_dir, team, tmp_path):
    (tmp_path / "mood").write_text("0 refused")
    team = replace(team, judge=Moody(mood=str(tmp_path / "mood")))
    with pytest.raises(ConfigError, match="The key is refused"):
        run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
    assert not list((tmp_path / "run").rglob("cells/*/*.json"))


def test_an_outage_of_a_real_server(model_dir, team, tmp_path, monkeypatch, no_attack):
    monkeypatch.setenv("POTION_KEY", "sk-moonroot")
    with serving(lambda answer, attempt: "400") as server:
        judge = LlmJudge(model="judge-1", base_url=server.url, api_key_env="POTION_KEY")
        team = replace(team, judge=judge)
        with pytest.raises(PatcherError, match="nothing was scored"):
            run_redteam(team, tmp_path / "run", str(model_dir), device="cpu")
        no_attack()
        server.plan = lambda answer, attempt: None
        (curve,) = run_redteam(team, tmp_path / "run", str(model_dir), device="cpu").curves
    assert curve.trusted
    assert sum(curve.judge_errors) == 0
