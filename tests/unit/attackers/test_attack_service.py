"""If these fail, an attacker's process attacks the wrong thing, twice, or for nobody."""

from pathlib import Path

import pytest
import torch

from patcher_pl.attackers import ConcurrentAttacker, FineTuningAttacker, Member, service
from patcher_pl.attackers.service import shared_state
from patcher_pl.errors import PatcherError, RunInterrupted
from patcher_pl.mailbox import Attacked, Mailbox, Theta
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.optim import AdamW
from patcher_pl.randomness import RandomState
from tests.concurrent_runs import concurrent, make_service
from tests.tiny_runs import ATTACKER, SEED, assert_same, load, snapshot

FIVE_STEPS = FineTuningAttacker(num_steps=5, optimizer=AdamW(lr=1e-3))


class Desk:
    """Stands for a defender: publishes a model and reads what attackers say."""

    def __init__(self, root: Path, path: Path) -> None:
        self.mailbox = Mailbox(root, 1)
        self.mailbox.create()
        self.model = load(path).train()

    def publish(self, version: int, *, number: int = 0, life: str = "one", **more) -> Theta:
        theta = Theta(life=life, version=version, step=9, number=number, seed=SEED, **more)
        self.mailbox.defender.publish(version, shared_state(self.model), theta.to_info())
        return theta

    def read(self) -> tuple[dict[str, torch.Tensor], Attacked]:
        weights = Weights(self.model)
        tensors = {
            name: torch.empty_like(parameter)
            for name, parameter in zip(weights.names, weights.parameters, strict=True)
        }
        found = self.mailbox.attackers[0].fetch(tensors)
        return tensors, Attacked.from_info(found.info)


@pytest.fixture
def desk(tmp_path, gpt2):
    return Desk(tmp_path / "mailbox", gpt2)


def serve(desk, gpt2, rows, **options):
    settings = {
        name: options.pop(name) for name in ("lock_step", "anchor", "attackers") if name in options
    }
    return make_service(concurrent(desk.mailbox.root, **settings), gpt2, rows, **options)


@pytest.mark.parametrize("anchor", ["current", "published"])
def test_what_is_published_is_attacked(desk, gpt2, rows, anchor):
    """As if attacked in the defender's process, from other weights than those it began with."""
    for parameter in desk.model.parameters():
        parameter.data.mul_(1.1)
    state, before = torch.get_rng_state(), snapshot(desk.model)
    outcome = ATTACKER.attack(
        desk.model,
        Weights(desk.model),
        rows.batches("attack", LanguageModel(path=str(gpt2)).load_tokenizer()),
    )
    torch.set_rng_state(state)
    theta = desk.publish(0, random_state=RandomState.capture(torch.device("cpu")).as_text())
    torch.manual_seed(99)  # Another process knows nothing of this one's generators.
    one = serve(desk, gpt2, rows, anchor=anchor)
    assert one.attack_next()
    tensors, report = desk.read()
    assert (report.theta, report.kind) == (
        theta,
        "weights" if anchor == "current" else "vector",
    )
    assert report.losses == [step.loss for step in outcome.steps]
    for tensor, change, start in zip(
        tensors.values(), outcome.vector, Weights(desk.model).parameters, strict=True
    ):
        expected = change if anchor == "published" else start.detach() + change
        assert torch.equal(tensor, expected)
    assert_same(snapshot(desk.model), before)


def test_an_attack_is_a_function_of_its_number(desk, gpt2, rows):
    """So that a restart changes nothing; with dropout, and data, of that number."""
    found = []
    for number in (1, 1, 2):
        desk.mailbox.attackers[0].clear()
        desk.publish(len(found), number=number)
        torch.rand(len(found))
        serve(desk, gpt2, rows).attack_next()
        found.append(desk.read()[1].losses)
    assert found[0] == found[1]
    assert found[2] != found[0]


def test_every_attack_takes_the_next_batches(desk, gpt2, rows):
    """As attacks in between would, one after the other from one stream."""
    batches = rows.batches("attack", LanguageModel(path=str(gpt2)).load_tokenizer())
    losses = []
    for number in range(3):
        state = RandomState.capture(torch.device("cpu")).as_text()
        outcome = ATTACKER.attack(desk.model, Weights(desk.model), batches)
        expected = [step.loss for step in outcome.steps]
        desk.publish(number, number=number, random_state=state)
        serve(desk, gpt2, rows).attack_next()
        losses.append(desk.read()[1].losses)
        assert losses[-1] == expected
    assert len({tuple(each) for each in losses}) == 3


def test_a_member_has_random_numbers_of_its_own(desk, gpt2, rows):
    losses = []
    for seed in (None, 1, 2):
        member = Member(attacker=ATTACKER, seed=seed)
        settings = ConcurrentAttacker(population=[member], mailbox=desk.mailbox.root)
        desk.publish(len(losses))
        make_service(settings, gpt2, rows).attack_next()
        losses.append(tuple(desk.read()[1].losses))
    assert len(set(losses)) == 3


def is_idle(one):
    """Whether it finds nothing to attack."""
    one._idle_timeout_s = 0.0
    with pytest.raises(PatcherError, match="anything to attack"):
        one.attack_next()
    one._idle_timeout_s = None
    return True


def test_nothing_is_attacked_twice_not_even_after_a_restart(desk, gpt2, rows):
    one = serve(desk, gpt2, rows)
    desk.publish(3)
    one.attack_next()
    assert is_idle(one)
    assert is_idle(serve(desk, gpt2, rows))
    # The same version of another life, as after somebody has emptied the mailbox by hand.
    desk.mailbox.defender.clear()
    desk.publish(3, life="two")
    assert one.attack_next()


def test_it_ends_with_the_defender_but_not_with_one_before(desk, gpt2, rows):
    desk.mailbox.finish("an earlier run")
    one = serve(desk, gpt2, rows)
    assert is_idle(one)
    desk.publish(0)
    assert one.attack_next()
    desk.mailbox.finish("one")
    assert not one.attack_next()


def test_it_does_not_wait_for_ever_unless_asked_to(desk, gpt2, rows):
    with pytest.raises(PatcherError, match=r"nothing|anything to attack for 0\.01 s\. Start `fit`"):
        serve(desk, gpt2, rows, idle_timeout_s=0.01).attack_next()


def test_an_attack_for_a_run_that_was_restarted_is_called_off(desk, gpt2, rows, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_AROUND_S", -1.0)
    calls = iter(range(100))

    def restart():
        if next(calls) == 3:
            desk.publish(1, life="two")

    one = serve(desk, gpt2, rows, attackers=[FIVE_STEPS], check=restart)
    desk.publish(0)
    assert one.attack_next()
    assert desk.mailbox.attackers[0].newest() is None
    spent = desk.mailbox.read_spent(0)
    assert (spent.finished, spent.lost, spent.under_way) == (0, 3, 0)
    assert one.attack_next()
    assert desk.read()[1].theta.life == "two"
    assert desk.mailbox.read_spent(0).finished == 5


def test_what_died_with_a_process_is_counted_as_lost(desk, gpt2, rows, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_AROUND_S", -1.0)

    def die():
        if desk.mailbox.read_spent(0).under_way == 1:
            raise RunInterrupted("killed")

    desk.publish(0)
    attackers = [FIVE_STEPS]
    with pytest.raises(RunInterrupted):
        serve(desk, gpt2, rows, attackers=attackers, check=die).attack_next()
    serve(desk, gpt2, rows, attackers=attackers).attack_next()
    spent = desk.mailbox.read_spent(0)
    assert (spent.finished, spent.lost) == (5, 1)
    assert spent.busy_s > 0


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("population", [], "Use FineTuningAttacker"),
        ("devices", ["cpu", "cpu"], "Name a device twice"),
        ("max_staleness", -1, "Use null"),
        ("max_failures", 0, "Use 1"),
        ("mailbox", None, "Name one"),
    ],
)
def test_bad_settings_are_refused(field, value, remedy):
    good = {"population": [Member(attacker=ATTACKER)], "mailbox": Path("m"), "launch": False}
    with pytest.raises(
        ValueError, match=rf"^ConcurrentAttacker\.{field} must be .+\. {remedy}.+\.$"
    ):
        ConcurrentAttacker(**{**good, field: value})


def test_populations_are_not_nested():
    inner = ConcurrentAttacker(population=[Member(attacker=ATTACKER)])
    with pytest.raises(ValueError, match=r"^Member\.attacker must be"):
        Member(attacker=inner)
