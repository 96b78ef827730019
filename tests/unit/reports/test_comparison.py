"""The table of a comparison shows what was measured, and what must be known to read it."""

import json

import pytest

from patcher_pl.reports.comparison import (
    DefenseComparison,
    DefenseTrial,
    TrainingCost,
    advantage_notes,
    comparison_notes,
    defense_table,
    trial_table,
)


@pytest.fixture
def costs():
    return {
        "sft": [TrainingCost(gradient_evaluations=100, num_steps=100)] * 2,
        "patcher": [
            TrainingCost(gradient_evaluations=100, num_steps=30),
            TrainingCost(gradient_evaluations=110, num_steps=33),
        ],
    }


def test_one_row_per_defense_with_cost_utility_and_break_points(curve, costs):
    spoken = {"perplexity": [2.0, 3.0, 3.0, 3.0, 3.0]}
    curves = [
        curve("sft", None, [0, 1, 1, 1, 1], 20, utility=spoken),
        curve("sft", None, [0.1, 0.4, 0.9, 1, 1], 40, seed=1, utility=spoken),
        curve("patcher", 120, [0, 0, 0, 0, 1.0], 160),
        curve("patcher", 120, [0, 0, 0, 0, 0.2], None, seed=1, collapsed=[False] * 4 + [True]),
        curve("patcher", 120, [0, 0, 0, 0, 0.2], None, seed=2),
        curve("patcher", 120, [0, 1, 1], 20, attack="lora"),
    ]
    sft, patcher = defense_table(curves, costs).to_dict("records")
    assert sft == {
        "defense": "SFT",
        "gradient evaluations": "100",
        "defender steps": "100",
        "ASR at N=0": "0.05",
        "benign accuracy": "1.00",
        "perplexity": "2.00",
        "full_adamw: breaks at": "20 (20 to 40)",
        "lora: breaks at": "-",
    }
    assert patcher["gradient evaluations"] == "100 to 110"
    assert patcher["defender steps"] == "30 to 33"
    assert patcher["perplexity"] == "-"
    assert patcher["full_adamw: breaks at"] == "> 160 (160 to > 160) \N{DAGGER}"
    assert patcher["lora: breaks at"] == "20"
    assert "collapsed" in comparison_notes(curves)[1]


def test_trials_show_settings_outcome_and_choice():
    options = {"model.init_args.optimizer.init_args.lr": 0.1}
    tried = DefenseTrial(
        defense="sft",
        number=0,
        options=options,
        steps_to_break=[10, None],
        area=0.25,
        released_asr=0.0,
        benign_accuracy=1.0,
        is_chosen=True,
    )
    failed = DefenseTrial(defense="sft", number=1, options=options, error="see log.txt")
    first, second = trial_table([tried, failed]).to_numpy().tolist()
    assert first == ["sft", "optimizer.lr 0.1", "10, held", "0.25", "0.00", "1.00", "chosen"]
    assert second == ["sft", "optimizer.lr 0.1", "-", "-", "-", "-", "failed"]


def test_files_hold_everything_and_medians(curve, costs, tmp_path):
    curves = [
        curve("sft", None, [0, 1, 1, 1, 1], 20),
        curve("sft", None, [0, 0.4, 0.9, 1, 1], 40, seed=1),
        curve("patcher", 120, [0, 0, 0, 0, 0.2], None),
    ]
    comparison = DefenseComparison(trials=[], costs=costs, environment={})
    comparison.save(tmp_path, curves)
    content = json.loads((tmp_path / "comparison.json").read_text())
    medians = {"SFT": 20.0, "Patcher, k1 = 120": None}
    assert content["median_steps_to_break"] == {"full_adamw": medians}
    assert content["costs"]["patcher"][1] == {"gradient_evaluations": 110, "num_steps": 33}
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3].startswith(
        "| Patcher, k1 = 120 | 100 to 110 | 30 to 33 | 0.00 | 1.00 | > 160 |"
    )


def attacked(curve, defense, attack, steps, seed, benign=(1.0, 1.0, 1.0, 1.0, 1.0)):
    asr = [float(steps is not None and at >= steps) for at in (0, 20, 40, 80, 160)]
    return curve(
        *(defense, None, asr, steps),
        attack=attack,
        attack_steps=[0, 20, 40, 80, 160],
        benign_accuracy=list(benign),
        train_seed=seed,
        seed=seed,
    )


def test_how_many_times_the_controls_steps_over_attacks(curve):
    """By hand: 80 for 20 and 320 (held) for 40, with one added to each, in the mean of their logarithms."""
    steps = {("sft", "full"): 20, ("mine", "full"): 80, ("sft", "lora"): 40, ("mine", "lora"): None}
    curves = [attacked(curve, *pair, broken, 0) for pair, broken in steps.items()]
    (line,) = advantage_notes(curves)
    first = 81 / 21 * 321 / 41
    assert line.startswith(f"mine: {first**0.5:.1f} times") and "2 attacks and 1 seed" in line
    assert line.endswith(f"By attack: {81 / 21:.1f} full, {321 / 41:.1f} lora.")
    steps[("mine", "full")] = 40
    curves += [
        attacked(curve, *pair, broken, seed)
        for seed in (1, 2, 3, 4)
        for pair, broken in steps.items()
    ]
    (line,) = advantage_notes(curves)
    ratio = (first * (41 / 21 * 321 / 41) ** 4) ** 0.1
    assert line.startswith(f"mine: {ratio:.1f} [") and "2 attacks and 5 seeds" in line
    assert line in comparison_notes(curves)


def test_a_model_that_an_attack_destroys_has_not_held(curve):
    """Wrong if a wrecked model counted as the most robust of all."""
    rows = [("sft", "full", 20), ("mine", "full", 40), ("sft", "sgd", 20), ("mine", "sgd", None)]
    wrecked = (1.0, 0.0, 0.0, 0.0, 0.0)
    curves = [attacked(curve, *row, 0, wrecked if row[2] is None else (1.0,) * 5) for row in rows]
    line, without = advantage_notes(curves)
    assert line.startswith(f"mine: {41 / 21:.1f} times") and "over 1 attack and 1 seed" in line
    assert without.startswith("Without sgd")
    healed = attacked(curve, "mine", "sgd", None, 0, (1.0, 0.0, 0.0, 0.0, 1.0))
    assert "over 2 attacks" in advantage_notes([*curves[:3], healed])[0]


def test_without_a_control_there_is_nothing_to_say(curve):
    assert advantage_notes([attacked(curve, "mine", "full", 20, 0)]) == []
