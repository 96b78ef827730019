"""A new defense is a loss function, a docstring and settings; wrong if it took another line.

It goes through the checks that hold for the defenses that are shipped, by the same functions.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch.nn import functional

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Defense, Patcher
from patcher_pl.defenses.outer_loss import OuterLoss
from patcher_pl.defenses.strategies import require_supported
from patcher_pl.errors import ConfigError
from patcher_pl.hypergradients import Adjoint
from patcher_pl.hypergradients.hvp import FiniteDifference
from patcher_pl.losses.causal_lm import model_inputs
from patcher_pl.models import LanguageModel, Lora, Weights
from patcher_pl.optim import SGD
from tests.concurrent_runs import attackers_at_work, concurrent
from tests.contract.test_defense_cost import (  # noqa: F401  # Run here for the new defense.
    test_a_budget_ends_no_step_half_way,
    test_a_budget_is_exceeded_by_less_than_a_step,
    test_cost_is_logged,
    test_every_pass_is_counted,
)
from tests.contract.test_defense_models import (  # noqa: F401
    test_adapters_are_sharded_where_weights_are,
    test_harmful_conversations_are_asked_for_where_they_are_needed,
    test_it_names_its_source,
    test_sharded_weights_work_or_are_refused,
    test_what_it_says_about_shards_is_what_it_does,
    test_what_was_trained_is_exported,
)
from tests.contract.test_defense_state import (  # noqa: F401
    even,
    test_a_resumed_run_ends_as_an_uninterrupted_one,
    test_a_seed_decides_a_run,
    test_accumulated_batches_are_one_large_batch,
    test_what_raises_midway_leaves_the_model_alone,
)
from tests.contract.test_defenses import (  # noqa: F401
    test_bad_settings_are_refused,
    test_everything_is_logged_at_defender_steps,
    test_gradients_are_clipped,
    test_max_steps_counts_defender_steps_across_epochs,
    test_precisions,
    test_the_logged_loss_is_the_mean_of_what_is_accumulated,
    test_three_steps,
)
from tests.defense_table import TABLE, Claims, build
from tests.tiny_runs import ATTACKER, MemoryLogger, adamw, assert_same, fit, load, snapshot
from tests.unit.defenses.test_refusals import trainer_of, two_shards


@dataclass(frozen=True, kw_only=True)
class FocalLoss(OuterLoss):
    """Cross-entropy that looks at what is still predicted badly: mean of (1 - p)^gamma (-log p).

    References:
        Lin et al., 2017, https://arxiv.org/abs/1708.02002, equation 4.
    """

    gamma: float = 2.0

    def loss(self, model, batch):
        logits, targets = model(**model_inputs(batch)).logits[:, :-1], batch["labels"][:, 1:]
        chosen = targets != -100
        surprise = functional.cross_entropy(logits[chosen], targets[chosen], reduction="none")
        return ((1 - (-surprise).exp()) ** self.gamma * surprise).mean()


class Focal(Patcher):
    """Patcher, with the focal loss after the attack.

    References:
        Lin et al., 2017, https://arxiv.org/abs/1708.02002.
    """

    default_outer = FocalLoss()


CLAIMS = Claims(
    settings={"attacker": ATTACKER, "refresh_every": 2, "num_sft_steps": 0},
    evaluations=(4, 2, 4, 2),
)


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    """The new defense, for the length of a test one of the table."""
    monkeypatch.setitem(TABLE, Focal, CLAIMS)
    return Focal


@pytest.fixture
def claims():
    return CLAIMS


@pytest.fixture
def make(llama):
    return partial(build, Focal, llama)


def test_it_trains_otherwise_than_patcher(llama, rows):
    """Wrong if the outer loss were not what the attacked model is trained for."""
    ends = {}
    for one in (Focal, Patcher):
        torch.manual_seed(0)
        logger = MemoryLogger()
        defense = one(LanguageModel(path=str(llama)), optimizer=adamw(), **CLAIMS.settings)
        fit(defense, rows.module(), 4, logger=logger)
        ends[one] = snapshot(defense.model), logger.history["train/loss_attacked"]
    assert ends[Focal][1] != ends[Patcher][1]
    assert any(not torch.equal(v, ends[Patcher][0][k]) for k, v in ends[Focal][0].items())


@pytest.mark.parametrize("named", ["the class", "the loss alone"])
def test_a_yaml_file_is_all_it_takes(llama, rows, named):
    """As a class of its own, or as Patcher with another outer loss; they are the same run."""
    by_loss = {"outer": {"class_path": f"{__name__}.FocalLoss", "init_args": {"gamma": 2.0}}}
    by_class = named == "the class"
    optimizer = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
    attacker = {
        "class_path": "patcher_pl.attackers.FineTuningAttacker",
        "init_args": {"num_steps": 2, "optimizer": optimizer},
    }
    options = {"refresh_every": 2, "num_sft_steps": 0, "attacker": attacker}
    options |= {"max_grad_norm": 0.5, "accumulate_grad_batches": 2}
    file = {
        "model": {
            "class_path": f"{__name__}.Focal" if by_class else "patcher_pl.defenses.Patcher",
            "init_args": {
                "language_model": {"path": str(llama)},
                **options,
                **({} if by_class else by_loss),
            },
        }
    }
    parser = ArgumentParser()
    parser.add_subclass_arguments(Defense, "model")
    defense = parser.instantiate(parser.parse_string(yaml.safe_dump(file))).model
    assert defense.outer == FocalLoss()
    assert (defense.max_grad_norm, defense.accumulate_grad_batches) == (0.5, 2)
    fit(defense, rows.module(), 3)
    by_hand = build(
        *(Focal, llama),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        max_grad_norm=0.5,
        accumulate_grad_batches=2,
    )
    fit(by_hand, rows.module(), 3)
    assert_same(snapshot(defense.model), snapshot(by_hand.model))


def test_attacks_beside_it_are_those_in_between(gpt2, rows, tmp_path):
    """In lock step, to the last bit; with dropout."""
    ends = []
    remote = concurrent(tmp_path / "mailbox", lock_step=True)
    with attackers_at_work(remote, gpt2, rows):
        for attacker in (ATTACKER, remote):
            torch.manual_seed(1)
            defense = build(Focal, gpt2, attacker=attacker)
            fit(defense, rows.module(), 5)
            ends.append((snapshot(defense.model), defense.cost))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_its_attacker_gets_every_weight_under_adapters(llama, rows):
    """Wrong if it attacked the adapters, as a weaker attacker would: same YAML, another threat."""
    defense = build(Focal, llama, model={"lora": Lora(rank=2)})
    fit(defense, rows.module(), 2)
    (vector,) = defense.attack_source.vectors
    assert len(vector) == len(LanguageModel(path=str(llama)).load_model().state_dict())
    assert all(bool(change.any()) for change in vector)


def test_every_point_of_its_attack_is_used(llama, rows):
    """Wrong if `vector_steps` were ignored."""
    points = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1), vector_steps=[1, 2])
    defense = build(Focal, llama, attacker=points)
    fit(defense, rows.module(), 1)
    assert len(defense.attack_source.vectors) == 2
    assert defense.cost.gradient_evaluations == 2 + 2 + 1


def test_two_attackers_are_not_one(llama, tmp_path):
    """Wrong if members of a population ran as the first of them, where no process is there for them."""
    alone, model = concurrent(tmp_path, [ATTACKER, ATTACKER]), load(llama)
    with pytest.raises(ConfigError, match=r"2 attackers in processes of their own.*`attacker`"):
        alone.attack(model, Weights(model), iter([]))


def test_estimators_take_its_outer_loss(llama, rows):
    attacker = FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1))
    options = {"attacker": attacker, "hypergradient": Adjoint(hvp=FiniteDifference())}
    defense, logger = build(Focal, llama, **options), MemoryLogger()
    require_supported(defense, trainer_of(two_shards()))
    fit(defense, rows.module(), 2, logger=logger)
    assert logger.history["train/loss_attacked"][1] != logger.history["train/loss_safe"][1]


def test_packed_batches_are_refused_unless_its_loss_knows_them(make, rows):
    with pytest.raises(ConfigError, match=r"data\.packing: Focal reads padded batches row by row"):
        fit(make(), rows.module(packing=True), 1)
