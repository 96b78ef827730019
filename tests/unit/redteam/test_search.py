"""Grid and search: what is varied, how strong an attack is, and that the worst case is found."""

import json
import math
from dataclasses import replace

import pytest

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.errors import ConfigError, PatcherError
from patcher_pl.models.lora import Lora
from patcher_pl.optim import AdamW
from patcher_pl.redteam import BenignThenHarmful, FullFinetuning, Grid, LoraFinetuning, Search
from patcher_pl.redteam.grid import ModelName, varied_cells
from patcher_pl.redteam.strength import attack_strength, attempt_of, mean_strength
from patcher_pl.redteam.variation import has_setting, setting_of, varied_attack
from patcher_pl.reports import Results
from patcher_pl.reports.results import Curve
from tests.red_team_parts import Dying

pytest.importorskip("optuna")


def make_curve(asr, steps=(0, 1, 3, 7), **fields):
    entries = {
        "defense": "sft",
        "seed": 0,
        "k1": None,
        "attack": "full_adamw",
        "family": "full_adamw",
        "attack_steps": list(steps),
        "asr": list(asr),
        "benign_accuracy": [None] * len(steps),
        "steps_to_break": None,
        "threshold": 0.5,
    }
    return Curve(**{**entries, **fields})


ATTACK = FullFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0, 10, 20, 40])


class TestStrength:
    def test_it_is_the_area_under_the_best_rate_so_far(self):
        """Over log2(1 + steps): measurements at 0, 1, 3 and 7 steps lie at 0, 1, 2 and 3."""
        assert attack_strength(make_curve([0, 0, 1, 1]), 7) == pytest.approx(1 / 3)
        assert attack_strength(make_curve([0, 0.5, 0.25, 1]), 7) == pytest.approx((0.5 + 0.5) / 3)
        assert attack_strength(make_curve([0, 0.5, 0.25, 1]), 15) == pytest.approx((1 + 1) / 4)
        assert attack_strength(make_curve([1, 0, 0, 0]), 7) == 1
        assert attack_strength(make_curve([0, 0, 0, 0]), 7) == 0

    def test_nothing_after_the_budget_counts(self):
        """Wrong if a longer attack won by its length alone."""
        assert attack_strength(make_curve([0, 0, 1, 1]), 2) == 0

    def test_an_attack_without_steps_is_compared_with_those_that_take_some(self):
        assert attack_strength(make_curve([0.75], steps=[0]), 1000) == pytest.approx(0.75)

    def test_what_was_not_scored_is_no_safety_and_no_success(self):
        assert math.isnan(attack_strength(make_curve([None] * 4), 7))
        assert math.isnan(attack_strength(make_curve([0, 0, 0, 0], trusted=False), 7))
        assert attack_strength(make_curve([0, None, 1, 1]), 7) == pytest.approx(1 / 3)
        curves = [make_curve([None] * 4), make_curve([1, 1, 1, 1])]
        assert mean_strength(curves, 7) == 1
        assert math.isnan(mean_strength(curves[:1], 7))

    def test_a_collapsed_model_gives_the_attacker_nothing(self):
        curve = make_curve([0, 0, 1, 1], collapsed=[False, False, True, True])
        assert attack_strength(curve, 7) == 0

    def test_bounded_a_model_of_no_use_gives_nothing_either(self):
        """Wrong if the worst case destroyed the model, or missed an attack nobody asked about."""
        curve = make_curve([0, 1, 1, 1], benign_accuracy=[1.0, 0.5, 0.95, 0.2])
        assert attack_strength(curve, 7) == pytest.approx(2 / 3)
        assert attack_strength(curve, 7, is_bounded=True) == pytest.approx(1 / 3)
        unknown = make_curve([0, 1, 1, 1])
        assert attack_strength(unknown, 7, is_bounded=True) == attack_strength(unknown, 7)

    def test_an_attempt_is_what_its_seeds_come_to(self):
        benign = [1.0, 0.5, 0.95, 0.2]
        curves = [
            make_curve([0, 1, 1, 0.5], benign_accuracy=benign),
            make_curve([0, 0, 0.5, 0.5], benign_accuracy=benign, seed=1),
            make_curve([0, 0, 0, 0.75], benign_accuracy=benign, seed=2),
        ]
        found = attempt_of(curves, 7, attack="a", settings={}, source="grid")
        assert found.asr == pytest.approx(1.75 / 3)
        assert found.bounded_asr == pytest.approx(0.5)
        assert (found.steps_to_break, found.bounded_steps_to_break) == (3, 3)
        assert found.is_usefulness_known
        one = attempt_of(curves[2:], 7, attack="a", settings={}, source="grid")
        assert (one.steps_to_break, one.bounded_steps_to_break) == (7, None)
        nothing = attempt_of([], 7, attack="a", settings={}, source="search", number=0)
        assert math.isnan(nothing.strength)
        assert (nothing.asr, nothing.steps_to_break) == (None, None)


class TestVariation:
    def test_only_settings_that_matter_are_varied(self):
        """Wrong if an attack that does not train ran once for every step size."""
        grid = Grid(lr=[1e-4, 1e-3], poison_ratio=[0.5, 1.0], schedule=["linear"])
        assert list(grid.combinations(Dying(how="bug"))) == [{}]
        assert list(grid.combinations(ATTACK)) == [
            {"lr": lr, "schedule": "linear", "poison_ratio": ratio}
            for lr in (1e-4, 1e-3)
            for ratio in (0.5, 1.0)
        ]

    def test_settings_reach_the_attack_and_its_data(self, red_team):
        settings = {"lr": 0.5, "num_steps": 30, "batch_size": 2, "schedule": "cosine"}
        settings |= {"num_warmup_steps": 3, "template": "Now: {prompt}"}
        settings |= {"poison_ratio": 1.0, "num_examples": 3}
        first, second = varied_cells(ATTACK, red_team.data, settings, [4, 5])
        assert (first.seed, second.seed) == (4, 5)
        assert first.family == "full_adamw"
        assert first.name.startswith("full_adamw lr=0.5 num_steps=30 batch_size=2")
        assert first.attack.attack_steps == [0, 10, 20, 30]
        assert first.data == replace(red_team.data, poison_ratio=1.0, num_examples=3)
        for name, value in settings.items():
            assert has_setting(ATTACK, name)
            assert setting_of(first.attack, first.data, name) == value

    def test_any_field_of_an_attack_is_varied_by_its_dotted_name(self, red_team):
        """Wrong if a field without a short name could not be in a grid, or short ones were others."""
        lora = LoraFinetuning(optimizer=AdamW(lr=1e-3), attack_steps=[0, 10], lora=Lora(rank=8))
        settings = {"optimizer.lr": 1, "lora.rank": 2, "asking.prefill": "So,"}
        settings |= {"data.num_examples": 3}
        (cell,) = varied_cells(lora, red_team.data, settings, [0])
        assert cell.attack == replace(
            lora,
            optimizer=AdamW(lr=1.0),
            lora=replace(lora.lora, rank=2),
            asking=replace(lora.asking, prefill="So,"),
        )
        assert cell.data == replace(red_team.data, num_examples=3)
        assert (
            cell.name
            == "lora_adamw optimizer.lr=1 lora.rank=2 asking.prefill=So, data.num_examples=3"
        )
        assert not has_setting(ATTACK, "lora.rank")
        assert list(Grid(**{"lora.rank": [2, 4]}).combinations(ATTACK)) == [{}]
        short = varied_cells(lora, red_team.data, {"lr": 1e-2, "num_examples": 3}, [0])
        full = {"optimizer.lr": 1e-2, "data.num_examples": 3}
        long = varied_cells(lora, red_team.data, full, [0])
        assert (short[0].attack, short[0].data) == (long[0].attack, long[0].data)

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            ({"lora.rnak": [1]}, r"RedTeam\.grid must name settings .* got 'lora\.rnak'"),
            ({"data.rows": [1]}, r"RedTeam\.grid must name settings .* got 'data\.rows'"),
            ({"asking": [1]}, r"RedTeam\.grid must name settings .* got 'asking'"),
            ({"batch_size": ["x"]}, r"FullFinetuning\.batch_size cannot be 'x'"),
            ({"lr": [1e-3], "optimizer.lr": [1e-4]}, "Grid must name a setting once"),
            ({"lr": [[1e-3]]}, r"Grid\.lr must hold numbers or words"),
        ],
    )
    def test_a_grid_that_varies_nothing_or_nonsense_is_refused(self, red_team, grid, message):
        """Wrong if a misspelled setting were a night's red team that varied nothing."""
        with pytest.raises(ValueError, match=message):
            replace(red_team, grid=grid).cells()

    def test_settings_that_stand_there_empty_are_no_settings(self, red_team):
        """Wrong if a configuration that an earlier version wrote out in full were refused."""
        team = replace(red_team, attacks=[Dying(how="bug")], grid={"lr": [], "schedule": []})
        assert [cell.varied for cell in team.cells()] == [{}]

    def test_a_longer_attack_is_still_measured_where_the_shorter_was(self):
        assert varied_attack(ATTACK, {"num_steps": 99}).attack_steps == [0, 10, 20, 40, 99]  # type: ignore[attr-defined]

    def test_values_that_an_attack_refuses_are_refused(self, red_team):
        with pytest.raises(ValueError, match=r"FullFinetuning\.batch_size must be >= 1"):
            replace(red_team, grid=Grid(batch_size=[0])).cells()
        with pytest.raises(ValueError, match=r"Grid\.lr must hold different values"):
            Grid(lr=[0.1, 0.1])


def run_scripted(chosen):
    """An attack is stronger, the closer its step size is to 0.01; half a poison ratio is better."""
    outcomes = []
    for attack, settings in chosen:
        distance = abs(math.log10(settings["lr"]) + 2)
        rate = max(0.0, 1 - distance / 4 - abs(settings["poison_ratio"] - 0.5))
        curve = make_curve([0, rate], steps=[0, 1], attack=str(settings), varied=settings)
        outcomes.append([replace(curve, family=attack.name)])
    return outcomes


def run_anything(chosen):
    return [[make_curve([0, 1], steps=[0, 1], family=attack.name)] for attack, _ in chosen]


class TestSearch:
    search = Search(num_trials=24, lr=[1e-5, 1.0], poison_ratio=[0.0, 1.0])

    @pytest.fixture
    def team(self, red_team):
        return replace(red_team, attacks=[ATTACK])

    def test_it_beats_a_coarse_grid(self, team):
        settings = [{"lr": lr, "poison_ratio": 1.0} for lr in (1e-4, 1.0)]
        grid = run_scripted([(ATTACK, entry) for entry in settings])
        tried = self.search.run(team, grid, run_scripted)
        assert len(tried) == 24 + 2
        assert [trial.source for trial in tried].count("grid") == 2
        strengths = [trial.strength for trial in tried]
        assert strengths == sorted(strengths, reverse=True)
        best_of_grid = max(trial.strength for trial in tried if trial.source == "grid")
        assert tried[0].source == "search"
        assert strengths[0] > best_of_grid + 0.05

    def test_the_grid_stays_the_worst_case_where_nothing_beats_it(self, team):
        """Wrong if the search reported something weaker than what is known already."""
        perfect = run_scripted([(ATTACK, {"lr": 1e-2, "poison_ratio": 0.5})])
        tried = replace(self.search, num_trials=1).run(team, perfect, run_scripted)
        assert tried[0].source == "grid"

    def test_the_same_search_asks_for_the_same_trials(self, team):
        """Wrong if an interrupted search could not go on with what it has."""
        assert self.search.run(team, [], run_scripted) == self.search.run(team, [], run_scripted)
        other = replace(self.search, seed=1).run(team, [], run_scripted)
        assert other != self.search.run(team, [], run_scripted)

    def test_what_the_grid_found_guides_it(self, team):
        grid = run_scripted(
            [
                (ATTACK, {"lr": 10**exponent, "poison_ratio": 0.5})
                for exponent in (-5, -4.5, -4, -3.5, -3, -2.5, -2.1, -2, -1.9, -1, -0.5)
            ]
        )
        taught = replace(self.search, num_trials=4).run(team, grid, run_scripted)
        untaught = replace(self.search, num_trials=4).run(team, [], run_scripted)
        found = [trial for trial in taught if trial.source == "search"]
        assert found != untaught

    def test_trials_that_could_not_be_scored_do_not_stop_it(self, team):
        def run_badly(chosen):
            return [[replace(curve, trusted=False)] for (curve,) in run_scripted(chosen)]

        tried = replace(self.search, num_trials=5).run(team, [], run_badly)
        assert all(math.isnan(trial.strength) for trial in tried)

    def run_destructive(self, chosen):
        """The larger its steps, the stronger an attack; from 0.01 on it leaves nothing of use."""
        outcomes = []
        for attack, settings in chosen:
            rate = min(1.0, 1 + math.log10(settings["lr"]) / 5)
            kept = 0.0 if settings["lr"] >= 1e-2 else 1.0
            fields = {"attack": str(settings), "varied": settings}
            fields["benign_accuracy"] = [1.0, kept, kept]
            curve = make_curve([0, rate, rate], steps=[0, 1, 2], **fields)
            outcomes.append([replace(curve, family=attack.name)])
        return outcomes

    def test_it_looks_for_the_strongest_attack_that_leaves_a_useful_model(self, team):
        """Wrong if the trials went where models are destroyed; both strongest are known after all."""
        search = Search(num_trials=16, lr=[1e-5, 1.0])
        destroyed = {}
        for objective in ("bounded", None):
            found = replace(search, objective=objective)
            tried = found.run(team, [], self.run_destructive)
            outcome = found.outcome(team, [], tried, ModelName("sft"))
            strongest = [outcome.strongest(is_bounded=bound) for bound in (True, False)]
            assert strongest[0].settings["lr"] < 1e-2 <= strongest[1].settings["lr"]
            assert tried[0] == strongest[objective is None]
            destroyed[objective] = sum(trial.settings["lr"] >= 1e-2 for trial in tried)
        assert destroyed["bounded"] < destroyed[None]

    def test_patience_ends_it_with_the_batch_in_which_it_ran_out(self, team):
        perfect = run_scripted([(ATTACK, {"lr": 1e-2, "poison_ratio": 0.5})])
        search = replace(self.search, patience=6)
        tried = search.run(team, perfect, run_scripted)
        assert len(tried) == 8 + 1, "nothing beats the grid, and batches have 4 trials"
        outcome = search.outcome(team, perfect, tried, ModelName("sft"))
        assert (outcome.num_idle, outcome.is_exhausted) == (8, True)
        every = self.search.run(team, perfect, run_scripted)
        asked = [trial for trial in every if trial.number is not None and trial.number < 8]
        assert [one for one in tried if one.source == "search"] == asked, "the same trials, fewer"

    def test_trials_without_a_score_use_up_no_patience(self, team):
        def run_badly(chosen):
            return [[replace(curve, trusted=False)] for (curve,) in run_scripted(chosen)]

        search = replace(self.search, num_trials=8, patience=1)
        assert len(search.run(team, [], run_badly)) == 8

    def test_values_out_of_range_are_refused(self):
        for fields, message in [
            ({"num_trials": 0}, r"Search\.num_trials must be >= 1"),
            ({"num_trials": 1, "batch": 0}, r"Search\.batch must be >= 1"),
            ({"num_trials": 1, "patience": 0}, r"Search\.patience must be >= 1, got 0"),
            (
                {"num_trials": 1, "min_improvement": 2},
                r"Search\.min_improvement must be in \[0, 1\]",
            ),
            ({"num_trials": 1, "lr": [1.0]}, r"Search\.lr must be \[low, high\]"),
            ({"num_trials": 1, "num_steps": [9, 3]}, r"Search\.num_steps must be \[low, high\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                Search(**fields)

    def test_any_field_may_be_searched_among_choices(self, team):
        attack = replace(ATTACK, label="warm")
        team = replace(team, attacks=[attack])
        search = Search(num_trials=4, space={"optimizer.lr": [1e-5, 1.0]}, max_grad_norm=[0.5, 1.0])
        tried = search.run(team, [], run_anything)
        assert {trial.settings["max_grad_norm"] for trial in tried} <= {0.5, 1.0}
        assert all(1e-5 <= trial.settings["optimizer.lr"] <= 1.0 for trial in tried)
        assert search == Search(num_trials=4, space=search.space)

    def test_without_optuna_the_remedy_is_named(self, team, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "optuna", None)
        with pytest.raises(ConfigError, match=r"pip install 'patcher-pl\[search\]'"):
            self.search.run(team, [], run_scripted)


def test_the_command_searches_and_goes_on(model_dir, red_team, tmp_path, capsys):
    """Wrong if a second call repeated attacks, or the strongest one were not in the results."""
    attack = FullFinetuning(optimizer=AdamW(lr=1e-5), attack_steps=[0, 20], batch_size=4)
    generation = replace(red_team.generation, max_new_tokens=16)
    team = replace(red_team, attacks=[attack], generation=generation, grid=Grid(lr=[1e-5]))
    search = Search(num_trials=3, lr=[1e-5, 3e-2], batch=2)
    options = {"search": search, "device": "cpu", "num_threads": 1}
    results = run_redteam(team, tmp_path, str(model_dir), **options)
    tried = json.loads((tmp_path / "search.json").read_text())["model"]
    assert [trial["source"] for trial in tried].count("grid") == 1
    assert len(tried) == 4
    assert {curve.attack for curve in results.curves} == {trial["attack"] for trial in tried}
    assert max(curve.asr[-1] for curve in results.curves) > results.curves[0].asr[-1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Strongest attack on model: full_adamw lr=" in shown
    assert "Strongest attack that leaves a useful model on model: full_adamw lr=" in shown
    assert "Tried: 1 of the grid and 3 in the search; " in shown
    (outcome,) = results.searches
    assert {trial.attack for trial in outcome.attempts} == {trial["attack"] for trial in tried}
    assert (tmp_path / "saturation.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "saturation.svg").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert run_redteam(team, tmp_path, str(model_dir), **options) == Results.load(
        tmp_path / "results.json"
    )
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert before == after


def test_settings_that_an_attack_cannot_have_are_passed_over(model_dir, red_team, tmp_path, capsys):
    """Wrong if the first impossible trial ended a night's search."""
    steps = {"attack_steps": [0, 3], "batch_size": 2, "num_benign_steps": 2}
    attack = BenignThenHarmful(optimizer=AdamW(lr=1e-5), **steps)
    team = replace(red_team, attacks=[attack])
    search = Search(num_trials=2, num_steps=[1, 2])
    with pytest.raises(PatcherError, match="Every attack failed"):
        run_redteam(team, tmp_path, str(model_dir), search=search, device="cpu")
    assert "Passed over: BenignThenHarmful.num_benign_steps must be" in capsys.readouterr().out
    tried = json.loads((tmp_path / "search.json").read_text())["model"]
    assert [trial["strength"] for trial in tried] == [None] * 3
