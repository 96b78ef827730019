"""Lines where there is no terminal: a log that says nothing looks like one of a run that hangs."""

import pytest

from patcher_pl import progress
from patcher_pl.progress import EVERY_S, ProgressLines, progress_bar, progress_lines


class Clock:
    """Goes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_line_every_half_minute_with_everything_in_it(clock):
    written = []
    lines = ProgressLines("attack steps", 100, write=written.append, clock=clock)
    for step in range(1, 61):
        clock.now += 2
        lines.update(step, loss=1 / step, num_tokens=500 * step)
    assert written == [
        "attack steps: 15 of 100, loss 0.06667, 250 tokens/s, 0:00:30 so far, 0:02:50 left",
        "attack steps: 30 of 100, loss 0.03333, 250 tokens/s, 0:01:00 so far, 0:02:20 left",
        "attack steps: 45 of 100, loss 0.02222, 250 tokens/s, 0:01:30 so far, 0:01:50 left",
        "attack steps: 60 of 100, loss 0.01667, 250 tokens/s, 0:02:00 so far, 0:01:20 left",
    ]


def test_a_long_step_is_no_silence(clock):
    written = []
    lines = ProgressLines("runs", 4, write=written.append, clock=clock)
    for _ in range(40):
        clock.now += 3
        lines.tick()
    assert written[0] == "runs: 0 of 4, 0:00:30 so far", "nobody knows how long it will take"
    assert len(written) == 4
    lines.advance()
    clock.now += 30
    lines.tick()
    assert written[-1] == "runs: 1 of 4, 0:02:30 so far, 0:07:30 left"


def test_what_was_done_before_does_not_make_it_look_faster(clock):
    written = []
    lines = ProgressLines(
        "steps", 1000, first=500, num_tokens=10**6, write=written.append, clock=clock
    )
    clock.now += 50
    lines.update(510, num_tokens=10**6 + 5000)
    assert written == ["steps: 510 of 1000, 100 tokens/s, 0:00:50 so far, 0:40:50 left"]


def test_without_a_known_end_it_counts(clock):
    written = []
    lines = ProgressLines("steps", None, write=written.append, clock=clock)
    clock.now += EVERY_S
    lines.update(7)
    assert written == ["steps: 7, 0:00:30 so far"]


def test_the_loss_is_not_read_at_every_step(clock):
    lines = ProgressLines("steps", None, write=[].append, clock=clock)
    assert lines.wants_loss
    lines.update(1, loss=0.5)
    assert not lines.wants_loss
    clock.now += EVERY_S
    assert lines.wants_loss


def test_lines_come_from_a_thread_of_their_own_and_end_with_the_block(monkeypatch, capsys):
    """Wrong if an hour within one step, or one job, left the log empty."""
    from threading import Event
    from threading import enumerate as threads

    beaten = Event()
    monkeypatch.setattr(progress, "EVERY_S", 0.001)
    monkeypatch.setattr(progress, "_BEAT_S", 0.001)
    monkeypatch.setattr(progress, "_print", lambda line: (print(line), beaten.set()))
    with progress_lines("runs", 2):
        assert beaten.wait(timeout=60)
        assert any(thread.name == "progress" for thread in threads())
    assert "runs: 0 of 2" in capsys.readouterr().out
    beaten.clear()
    with progress_bar("attacks", 2) as advance:
        assert beaten.wait(timeout=60)
        advance()
    assert "attacks: 0 of 2" in capsys.readouterr().out


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_lines("steps", 2) as lines:
        lines.update(1)
    assert "so far" not in capsys.readouterr().out
    with progress_bar("[red]runs", 2) as advance:
        advance()
    shown = capsys.readouterr().out
    assert "[red]runs" in shown
    assert "1/2" in shown
    assert "so far" not in shown
