"""If these fail, attacks that run beside the defender are not those that were asked for."""

import threading
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.callbacks import ConcurrencyMonitor
from patcher_pl.defenses import Patcher
from patcher_pl.defenses.attack_source import concurrent as source_module
from patcher_pl.defenses.retention import KLToBase
from patcher_pl.errors import RunInterrupted
from patcher_pl.mailbox import wait_for
from patcher_pl.models import LanguageModel, Lora
from patcher_pl.optim import SGD, AdamW
from tests.attack_table import ATTACKERS
from tests.concurrent_runs import attackers_at_work, concurrent
from tests.tiny_runs import ATTACKER, MemoryLogger, SaveAt, adamw, assert_same, fit, snapshot

NUM_STEPS = 8
WITH_LORA = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-2), lora=Lora(rank=2))

LOW_MEMORY = FineTuningAttacker(num_steps=2, optimizer=AdamW(lr=1e-3, state_dtype="bfloat16"))


def make(path, attacker, lora=None, **options):
    settings = {"optimizer": adamw(), "refresh_every": 3, "num_sft_steps": 2, **options}
    return Patcher(LanguageModel(path=str(path), lora=lora), attacker, **settings)


def run(defense, data, max_steps=NUM_STEPS, seed=1, **options):
    logger = MemoryLogger()
    torch.manual_seed(seed)
    trainer = fit(defense, data, max_steps, logger=logger, **options)
    assert trainer.global_step == max_steps
    return logger.history


def losses(history):
    kinds = ("train/", "attack/")
    return {key: value for key, value in history.items() if key.startswith(kinds)}


@pytest.mark.parametrize(
    ("family", "attacker", "lora", "accumulate"),
    [
        pytest.param("llama", ATTACKER, None, 1, id="full"),
        pytest.param("gpt2", ATTACKER, None, 2, id="dropout-accumulated"),
        pytest.param("llama", WITH_LORA, Lora(rank=2, dropout=0.1), 1, id="lora-lora"),
        pytest.param("gpt2", ATTACKERS["carried"], None, 1, id="carried"),
        pytest.param("gpt2", ATTACKERS["growing"], None, 1, id="growing"),
        pytest.param("llama", LOW_MEMORY, None, 1, id="bfloat16-moments"),
    ],
)
def test_lock_step_is_the_sequential_run(
    request, rows, tmp_path, family, attacker, lora, accumulate
):
    """To the last bit, in weights, losses, cost and what a checkpoint would hold."""
    path = request.getfixturevalue(family)
    options = {"lora": lora, "accumulate_grad_batches": accumulate}
    sequential, data = make(path, attacker, **options), rows.module()
    history = run(sequential, data)
    remote = concurrent(tmp_path / "mailbox", [attacker], lock_step=True)
    beside, data_beside = make(path, remote, **options), rows.module()
    with attackers_at_work(remote, path, rows, lora=lora):
        history_beside = run(beside, data_beside)
    assert_same(snapshot(beside.model), snapshot(sequential.model))
    assert losses(history_beside) == losses(history)
    assert beside.cost == sequential.cost
    assert data_beside.state_dict() == data.state_dict()
    (vector,) = beside.attack_source.vectors_at(NUM_STEPS)
    pairs = zip(vector, sequential.attack_source.vectors[-1], strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert beside.attack_source.num_wasted == 0


def test_what_is_retained_in_lock_step_is_what_is_in_the_sequential_run(gpt2, rows, tmp_path):
    """Wrong if the attacked model, or one that was published, stood for the base model."""
    retain = KLToBase(data=rows.mixtures["val"], weight=0.5, attacked_weight=0.5)
    sequential = make(gpt2, ATTACKER, retain=retain)
    history = run(sequential, rows.module())
    remote = concurrent(tmp_path / "mailbox", lock_step=True)
    beside = make(gpt2, remote, retain=retain)
    with attackers_at_work(remote, gpt2, rows):
        history_beside = run(beside, rows.module())
    assert_same(snapshot(beside.model), snapshot(sequential.model))
    assert losses(history_beside) == losses(history)
    assert max(history["train/retain_distance_attacked"].values()) > 0


@contextmanager
def attacks(form, path, rows, mailbox):
    """Yields an attacker that works in between, or one that does the same beside."""
    if form == "sequential":
        yield ATTACKER
        return
    remote = concurrent(mailbox, lock_step=True)
    with attackers_at_work(remote, path, rows):
        yield remote


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        pytest.param("beside", "beside", 1, id="before-the-first-attack"),
        pytest.param("beside", "beside", 4, id="within-a-round"),
        pytest.param("beside", "beside", 5, id="between-rounds"),
        pytest.param("sequential", "beside", 4, id="from-sequential"),
        pytest.param("beside", "sequential", 4, id="to-sequential"),
    ],
)
def test_a_resumed_lock_step_run_is_the_uninterrupted_one(
    gpt2, rows, tmp_path, before, after, step
):
    """With another mailbox and other processes, as after a crash. With dropout."""
    whole = make(gpt2, ATTACKER)
    run(whole, rows.module())
    with attacks(before, gpt2, rows, tmp_path / "first") as attacker:
        torch.manual_seed(1)
        checkpoint = SaveAt(step, tmp_path / "step.ckpt")
        fit(make(gpt2, attacker), rows.module(), NUM_STEPS, callbacks=[checkpoint])
    with attacks(after, gpt2, rows, tmp_path / "second") as attacker:
        resumed = make(gpt2, attacker)
        run(resumed, rows.module(), seed=99, ckpt_path=checkpoint.path, weights_only=True)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost


class SaveWhenStopped(Callback):
    """What the command line does where a signal has come."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        assert isinstance(exception, RunInterrupted)
        assert pl_module.is_between_steps
        trainer.save_checkpoint(self.path)


def test_a_run_that_is_stopped_while_it_waits_goes_on_as_if_it_had_not(gpt2, rows, tmp_path):
    """Wrong if the batch of the step that never began, or half an exchange, were lost."""
    whole = make(gpt2, ATTACKER)
    run(whole, rows.module())
    remote = concurrent(tmp_path / "first", lock_step=True)
    stopped = make(gpt2, remote)
    save = SaveWhenStopped(tmp_path / "stopped.ckpt")
    with attackers_at_work(remote, gpt2, rows):
        torch.manual_seed(1)
        real = stopped.check_for_stop

        def stop_in_second_wait():
            stopped.stop_requested = stopped.global_step == 5
            real()

        stopped.check_for_stop = stop_in_second_wait
        with pytest.raises(RunInterrupted):
            fit(stopped, rows.module(), NUM_STEPS, callbacks=[save])
    assert stopped.global_step == 5
    with attacks("beside", gpt2, rows, tmp_path / "second") as attacker:
        resumed = make(gpt2, attacker)
        run(resumed, rows.module(), seed=99, ckpt_path=save.path, weights_only=True)
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.cost == whole.cost


class Stalenesses(Callback):
    """Notes the staleness of what every step used."""

    def __init__(self):
        self.of_step = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.global_step
        if pl_module.attack_source.vectors_at(step - 1):
            self.of_step[step] = pl_module.attack_source.staleness(step - 1)


@contextmanager
def defender_that_is_seen_waiting(monkeypatch):
    """Yields an event that is set for as long as the defender waits."""
    waiting = threading.Event()
    real = source_module.wait_for

    def seen(look, between):
        waiting.set()
        try:
            return real(look, between)
        finally:
            waiting.clear()

    with monkeypatch.context() as patch:
        patch.setattr(source_module, "wait_for", seen)
        yield waiting


@contextmanager
def slow_attackers_at_work(remote, path, rows, monkeypatch):
    """Attackers so slow that they only move while the defender waits."""
    with defender_that_is_seen_waiting(monkeypatch) as waiting:
        over = threading.Event()

        def only_while_waiting():
            while not (waiting.wait(0.01) or over.is_set()):
                pass

        with attackers_at_work(remote, path, rows, check=only_while_waiting):
            try:
                yield
            finally:
                over.set()


@pytest.mark.parametrize("bound", [2, 3, 5, 7])
def test_no_step_is_staler_than_allowed(llama, rows, tmp_path, monkeypatch, bound):
    remote = concurrent(tmp_path / "mailbox", max_staleness=bound)
    seen = Stalenesses()
    with slow_attackers_at_work(remote, llama, rows, monkeypatch):
        run(make(llama, remote), rows.module(), 14, callbacks=[seen])
    assert list(seen.of_step) == list(range(3, 15))
    assert max(seen.of_step.values()) == bound


def test_a_bound_of_two_rounds_makes_the_run_reproducible(llama, rows, tmp_path, monkeypatch):
    """Every theta is attacked and used one round later, however fast the attacker is."""
    ends = []
    for number, at_work in enumerate((attackers_at_work, slow_attackers_at_work)):
        remote = concurrent(tmp_path / str(number), max_staleness=2 * 3 - 1)
        pace = () if number == 0 else (monkeypatch,)
        defense, seen = make(llama, remote, num_sft_steps=3), Stalenesses()
        with at_work(remote, llama, rows, *pace):
            run(defense, rows.module(), 11, callbacks=[seen])
        assert list(seen.of_step.values()) == [3, 4, 5, 3, 4, 5, 3, 4]
        ends.append(snapshot(defense.model))
    assert_same(*ends)


def test_without_a_bound_the_defender_goes_on_with_what_it_has(llama, rows, tmp_path):
    """Wrong if an attacker that is gone held up the run. One attack, and never another."""
    remote = concurrent(tmp_path / "mailbox")
    over, seen = threading.Event(), Stalenesses()

    def once():
        if any((tmp_path / "mailbox" / "attacker-0").glob("0*")):
            over.wait()

    with attackers_at_work(remote, llama, rows, check=once):
        try:
            defense = make(llama, remote)
            run(defense, rows.module(), 11, callbacks=[seen])
        finally:
            over.set()
    stalest = list(seen.of_step.values())
    assert stalest == list(range(stalest[0], stalest[0] + 9))


class Fresh(Callback):
    """Waits before every step until whatever is published has been attacked."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        mailbox = pl_module.attack_source.mailbox
        published = mailbox.defender.versions()[-1:]
        for side in mailbox.attackers:
            wait_for(lambda side=side: side.versions()[-1:] == published or None, lambda: None)


def test_a_vector_is_one_round_old_where_the_attacker_keeps_up(llama, rows, tmp_path):
    """The first theta goes out one refresh early, so that nobody waits at the first pick-up."""
    remote = concurrent(tmp_path / "mailbox")
    seen = Stalenesses()
    with attackers_at_work(remote, llama, rows):
        defense = make(llama, remote, num_sft_steps=3)
        history = run(defense, rows.module(), 9, callbacks=[seen, Fresh(), ConcurrencyMonitor()])
    assert seen.of_step == {4: 3, 5: 4, 6: 5, 7: 3, 8: 4, 9: 5}
    assert list(history["attack/loss"]) == [3, 6]
    assert history["concurrent/staleness"] == {
        step: seen.of_step.get(step, 0) for step in range(1, 10)
    }
    assert all(0 <= value <= 1 for value in history["concurrent/defender_utilization"].values())
    assert all(0 <= value <= 1 for value in history["concurrent/attacker_utilization"].values())
    assert "concurrent/overlap_gained_s" in history
    assert set(history["concurrent/restarts"].values()) == {0}
    # 3 plain steps, 6 of two passes, 2 attacks; the theta of step 6 was attacked in vain.
    assert defense.cost.gradient_evaluations == 3 + 12 + 2 * ATTACKER.num_steps
    assert defense.attack_source.num_wasted == ATTACKER.num_steps


class VectorsAt(Callback):
    """Keeps weights and vectors before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.weights = pl_module.all_weights.snapshot()
        if trainer.global_step == self.step + 1:
            self.vectors = [slot.vector for slot in pl_module.attack_source.slots]


@pytest.mark.parametrize("anchor", ["current", "published"])
def test_what_the_vector_starts_from(llama, rows, tmp_path, anchor):
    """Theta of step 0 is attacked and picked up at step 3: by hand."""
    remote = concurrent(tmp_path / "mailbox", anchor=anchor)
    kept = VectorsAt(3)
    with attackers_at_work(remote, llama, rows):
        defense = make(llama, remote, num_sft_steps=3)
        run(defense, rows.module(), 4, callbacks=[kept, Fresh()])
    attacked = make(llama, ATTACKER)
    attacked.configure_model()
    attacked.model.train()
    started = attacked.all_weights.snapshot()
    outcome = ATTACKER.attack(
        attacked.model, attacked.all_weights, rows.batches("attack", defense.tokenizer)
    )
    starts = kept.weights if anchor == "current" else started
    (vector,) = kept.vectors
    for change, begun, from_begun, start in zip(
        vector, started, outcome.vector, starts, strict=True
    ):
        torch.testing.assert_close(change, begun + from_begun - start, rtol=0, atol=1e-6)


POPULATION = [
    FineTuningAttacker(num_steps=2, optimizer=SGD(lr=0.1)),
    FineTuningAttacker(num_steps=3, optimizer=SGD(lr=0.3)),
]


@pytest.mark.parametrize("combine", ["in_turn", "average"])
def test_a_population(llama, rows, tmp_path, combine):
    """Both members' vectors are used; an average costs one more gradient per step."""
    remote = concurrent(tmp_path / "mailbox", POPULATION, lock_step=True, combine=combine)
    with attackers_at_work(remote, llama, rows):
        defense = make(llama, remote, num_sft_steps=0)
        history = run(defense, rows.module(), 4)
    first, second = (slot.vector for slot in defense.attack_source.slots)
    used = [defense.attack_source.vectors_at(step) for step in (2, 3)]
    if combine == "in_turn":
        assert [len(vectors) for vectors in used] == [1, 1]
        assert [used[0][0] is first, used[1][0] is second] == [True, True]
    else:
        assert all(vectors[0] is first and vectors[1] is second for vectors in used)
    passes = 2 if combine == "in_turn" else 3
    assert defense.cost.gradient_evaluations == 4 * passes + 2 * (2 + 3)
    assert list(history["attack_0/loss"]) == list(history["attack_1/loss"]) == [0, 3]
    assert history["attack_0/vector_norm"][3] != history["attack_1/vector_norm"][3]


def test_two_of_the_same_are_one(llama, rows, tmp_path):
    """The average of equal losses has the gradient of one of them."""
    weights = []
    for number, attackers in enumerate(([POPULATION[1]], [POPULATION[1], POPULATION[1]])):
        remote = concurrent(tmp_path / str(number), attackers, lock_step=True, combine="average")
        with attackers_at_work(remote, llama, rows):
            defense = make(llama, remote, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
            run(defense, rows.module())
        weights.append(snapshot(defense.model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)
