"""How long a study will take: what was measured first, corrected by what its runs took."""

import pytest

from patcher_pl.comparison import Column, Contender, Selection
from patcher_pl.comparison.workload import AttackLoad, Throughput, Workload

SEARCH = AttackLoad(num_steps=10, num_measurements=2)
ATTACKS = AttackLoad(num_steps=100, num_measurements=5)
THROUGHPUT = Throughput(start_s=4.0, evaluation_s=0.1, measurement_s=1.0)


@pytest.fixture
def columns(tmp_path):
    """Two budgets, two defenses (one at the larger budget alone), two trials, three models."""
    redteam = tmp_path / "redteam.yaml"
    for name in ("fit.yaml", "redteam.yaml"):
        (tmp_path / name).write_text("a: 1\n")
    selection = Selection(redteam=redteam, num_trials=2, seeds=[9])
    defenses = {
        "sft": Contender(fit=tmp_path / "fit.yaml", space={"lr": [1, 2]}),
        "mine": Contender(fit=tmp_path / "fit.yaml", space={"lr": [1, 2]}, min_budget=100),
    }
    return [
        Column.plan(defenses, redteam, selection, [0, 1, 2], budget, None, tmp_path / str(budget))
        for budget in (50, 100)
    ]


def finish(fit, seconds):
    fit.write(True, seconds=seconds)


def test_every_run_is_counted_with_its_training_and_attacks(columns):
    work = Workload.of(columns, SEARCH, ATTACKS, {})
    assert len(work.runs) == 3 * (2 + 3)
    assert work.num_evaluations == 5 * (50 + 100 + 100) + 3 * (2 * 10 + 3 * 100)
    assert work.num_done == 0
    searches = 4 + 0.1 * (50 + 10) + 2 + 2 * (4 + 0.1 * (100 + 10) + 2)
    models = 4 + 0.1 * (50 + 100) + 5 + 2 * (4 + 0.1 * (100 + 100) + 5)
    assert work.seconds_left(THROUGHPUT) == pytest.approx(2 * searches + 3 * models)


def test_finished_runs_correct_the_estimate_of_their_own_defense_first(columns):
    """Wrong if a defense that takes ten times as long a step were expected to be as fast as others."""
    for column in columns:
        for trial in column.searched["sft"]:
            finish(trial.fits[0], 3 * THROUGHPUT.seconds(column.budget, SEARCH))
    work = Workload.of(columns, SEARCH, ATTACKS, {})
    assert work.num_done == 4
    left = 3 * 3 * (THROUGHPUT.seconds(50, ATTACKS) + THROUGHPUT.seconds(100, ATTACKS))
    mine = 2 * THROUGHPUT.seconds(100, SEARCH) + 3 * THROUGHPUT.seconds(100, ATTACKS)
    assert work.seconds_left(THROUGHPUT) == pytest.approx(left + 3 * mine)
    finish(columns[1].searched["mine"][0].fits[0], 10 * THROUGHPUT.seconds(100, SEARCH))
    work = Workload.of(columns, SEARCH, ATTACKS, {})
    mine -= THROUGHPUT.seconds(100, SEARCH)
    assert work.seconds_left(THROUGHPUT) == pytest.approx(left + 10 * mine)


def test_models_whose_settings_are_chosen_count_as_done_once_they_are(columns):
    models = columns[0].models({"sft": {"lr": 2}})
    finish(models["sft"][1], 1.0)
    work = Workload.of(columns, SEARCH, ATTACKS, {50: models})
    assert len(work.runs) == 15
    assert work.num_done == 1


def test_a_budget_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"Contender\.min_budget must be >= 0, got -1"):
        Contender(fit="fit.yaml", min_budget=-1)
