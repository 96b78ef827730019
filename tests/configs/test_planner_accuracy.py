"""The planner against real runs; `tools/check_planner.py` does the same at larger sizes."""

import pytest

from tools.check_planner import Formats, compare


@pytest.mark.slow
@pytest.mark.parametrize("hypergradient", ["FirstOrder", "Adjoint"])
@pytest.mark.parametrize("size", ["10M", "60M"])
def test_planned_memory_is_within_a_fifth_of_the_measured(size, hypergradient, tmp_path):
    assert compare(tmp_path, size, hypergradient)["ratio"] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("attacker", ["bfloat16", "8bit"])
def test_moments_in_few_bytes_are_planned_within_a_twentieth(attacker, tmp_path):
    found = compare(tmp_path, "10M", "FirstOrder", formats=Formats(attacker=attacker))
    assert found["ratio"] == pytest.approx(1, abs=0.05)
