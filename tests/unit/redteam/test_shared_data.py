"""An attack is not measured on what it trains on, unless that is wanted."""

import json
import logging
from dataclasses import replace

import pytest

from patcher_pl.cli.redteam import run_redteam
from patcher_pl.data import ChatFormat, Mixture, Source
from patcher_pl.errors import DataError
from patcher_pl.evaluation import Benchmark
from patcher_pl.redteam import FullFinetuning, Jailbreak
from patcher_pl.redteam.asking import Asking
from patcher_pl.reports import Results


@pytest.fixture
def source(tmp_path):
    def write(name, *prompts):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": prompt, "response": "Stir."} for prompt in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path), harmful=True)

    return write


@pytest.fixture
def team(red_team, source):
    """Two of its four rows ask one of its three prompts."""
    attack = FullFinetuning(optimizer=red_team.attacks[0].optimizer, attack_steps=[0, 1])
    return replace(
        red_team,
        attacks=[attack],
        data=Mixture(sources=[source("rows", "Tea?", "TEA!", "Soup?", "Cake?")]),
        prompts=Benchmark(source=source("prompts", "tea", "Pie?", "Bread?")),
        benign_prompts=Benchmark(source=source("benign", "Cake?")),
        generation=replace(red_team.generation, max_new_tokens=2),
        overlap="error",
    )


REFUSED = (
    r"1 of 3 harmful prompts are among the rows .*rows\.jsonl:1 and .*prompts\.jsonl:1.*`drop`"
)


def test_rows_that_are_prompts_are_refused_before_anything_is_done(team, tmp_path):
    """Wrong if attack success were measured on training data and nobody knew."""
    with pytest.raises(DataError, match=REFUSED):
        run_redteam(team, tmp_path / "run", "no/model", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_share_that_the_data_cannot_have_is_told_before_anything_is_done(team, tmp_path):
    """Wrong if `fit`, or a red team that hardens its models, trained for hours and then failed."""
    data = replace(team.data, poison_ratio=0.5)  # Every row is harmful.
    with pytest.raises(DataError, match=r"poison_ratio"):
        run_redteam(
            replace(team, data=data, overlap="drop"), tmp_path / "run", "no/model", device="cpu"
        )
    assert not (tmp_path / "run").exists()


def test_nothing_is_refused_where_nothing_is_trained(team):
    jailbreak = Jailbreak(asking=Asking(prefill="Sure."))
    assert replace(team, attacks=[jailbreak]).shared_data({}) == []


def drawn(team, tokenizer):
    campaign = team.campaign(tokenizer, ChatFormat())
    return [row.prompt[0].content for row in campaign.material(team.cells()[0]).rows]


def test_they_are_left_out_or_allowed_as_the_setting_says(team, tokenizer, caplog):
    with pytest.raises(DataError, match=r"harmful prompts are among the rows"):
        drawn(team, tokenizer)
    allowed = drawn(replace(team, overlap="allow"), tokenizer)
    assert sorted(allowed) == ["Cake?", "Soup?", "TEA!", "Tea?"]
    with caplog.at_level(logging.WARNING):
        dropped = drawn(replace(team, overlap="drop"), tokenizer)
    assert sorted(dropped) == ["Cake?", "Soup?"]
    assert "2 rows of the attacker ask harmful prompts" in caplog.text
    fixed = replace(team, overlap="drop", data=replace(team.data, num_examples=2))
    assert sorted(drawn(fixed, tokenizer)) == ["Cake?", "Soup?"], "others take their place"


def test_training_data_is_held_against_all_of_it(team, source, caplog):
    training = {
        "defender": Mixture(sources=[source("safe", "Pie?", "Soup?")]),
        "simulated attacker": Mixture(sources=[source("unsafe", "Soup?")]),
    }
    found = replace(team, overlap="allow").shared_data(training)
    shared = {(entry.first, entry.second): entry.shared_prompts for entry in found}
    assert shared == {
        ("defender", "simulated attacker"): 1,
        ("defender", "red team"): 1,
        ("defender", "harmful prompts"): 1,
        ("defender", "benign prompts"): 0,
        ("simulated attacker", "red team"): 1,
        ("simulated attacker", "harmful prompts"): 0,
        ("simulated attacker", "benign prompts"): 0,
        ("red team", "harmful prompts"): 1,
        ("red team", "benign prompts"): 1,
    }
    assert "1 of 3 harmful prompts are also asked in the data of the defender" in caplog.text


def test_results_say_what_is_shared(team, model_dir, tmp_path):
    run_redteam(replace(team, overlap="drop"), tmp_path / "run", str(model_dir), device="cpu")
    found = Results.load(tmp_path / "run" / "results.json").overlap
    assert [(entry.second, entry.shared_prompts) for entry in found] == [
        ("harmful prompts", 1),
        ("benign prompts", 1),
    ]
