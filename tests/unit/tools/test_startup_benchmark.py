"""The benchmark of start-up runs; what commands import is tested in `tests/unit/cli/test_help.py`."""

import subprocess

import pytest

from tools.throughput.startup import COMMANDS, YARDSTICK, measure


def test_commands_are_compared_with_the_yardstick():
    few = {YARDSTICK: ("-c", "pass"), "help": COMMANDS["help"]}
    found = measure(num_rounds=2, commands=few)
    assert set(found["ratios"]) == {"startup_help", "startup_help_cpu"}
    assert set(found["wall_s"]) == set(few)
    assert all(seconds > 0 for seconds in found["wall_s"].values())


def test_a_command_that_fails_is_not_timed():
    """Wrong if a command that ends at once with an error passed for a fast one."""
    with pytest.raises(subprocess.CalledProcessError):
        measure(num_rounds=1, commands={YARDSTICK: ("-c", "raise SystemExit(2)")})
