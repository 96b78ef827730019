"""If these fail, an attacker's process computes something else than the defender's would have."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from patcher_pl.attackers import ConcurrentAttacker, Member
from patcher_pl.attackers.service import shared_state
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.attacker_module import AttackerModule
from patcher_pl.mailbox import Attacked, Mailbox, Theta
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.randomness import RandomState
from tests.tiny_runs import ATTACKER, SEED, Rows, adamw, fit, load


def attack_once(path: Path, data, root: Path, seed=SEED, member=None, **trainer):
    """One attack on the weights at `path`, as an attacker's process does it; returns its vector."""
    member = Member(attacker=ATTACKER) if member is None else member
    settings = ConcurrentAttacker(population=[member], mailbox=root, anchor="published")
    mailbox = Mailbox(root, 1)
    mailbox.create()
    model = load(path)
    torch.manual_seed(1)
    state = RandomState.capture(torch.device("cpu")).as_text()
    theta = Theta(life="one", version=0, step=0, number=0, seed=seed, random_state=state)
    mailbox.defender.publish(0, shared_state(model), theta.to_info())
    torch.manual_seed(99)  # Another process knows nothing of this one's generators.
    weights = Weights(model)
    vector = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    reports = []

    def end_after_one() -> None:
        found = mailbox.attackers[0].fetch(vector)
        if found is not None:
            reports.append(Attacked.from_info(found.info))
            mailbox.finish("one")

    defense = Patcher(LanguageModel(path=str(path)), settings)
    module = AttackerModule(
        defense, data, settings, index=0, mailbox=mailbox, check=end_after_one, idle_timeout_s=None
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=-1, max_epochs=-1, **options, **quiet, **trainer).fit(module)
    return [vector[name] for name in weights.names], reports[0]


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_an_attack_elsewhere_is_the_attack_in_between(gpt2, rows, tmp_path, precision):
    """Whatever number format the trainer asks for; with dropout."""
    defense = Patcher(LanguageModel(path=str(gpt2)), ATTACKER, optimizer=adamw(), num_sft_steps=0)
    torch.manual_seed(1)
    fit(defense, rows.module(), 1, precision=precision)
    vector, _ = attack_once(gpt2, rows.module(), tmp_path / "mailbox", precision=precision)
    for ours, theirs in zip(vector, defense.attack_source.vectors[-1], strict=True):
        assert bool(theirs.any())
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
def test_a_member_trains_on_its_own_data(gpt2, rows, tmp_path):
    """Which are those of a run with these data and this seed."""
    other = Rows(tmp_path / "other", num_safe=9).mixtures["safe"]
    losses = {}
    for name, member in {
        "run": Member(attacker=ATTACKER),
        "seed": Member(attacker=ATTACKER, seed=5),
        "data": Member(attacker=ATTACKER, data=other),
    }.items():
        _, report = attack_once(gpt2, rows.module(), tmp_path / name, member=member)
        losses[name] = report.losses
    assert losses["run"] != losses["seed"] != losses["data"] != losses["run"]
    own = rows.module(seed=SEED)
    assert own.with_attack(other)._mixtures["attack"] is other
    assert own._mixtures["attack"] is rows.mixtures["attack"]
