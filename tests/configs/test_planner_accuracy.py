"""The planner against real runs; `tools/check_planner.py` does the same at larger sizes."""

import pytest

from tools.check_planner import compare


@pytest.mark.slow
@pytest.mark.parametrize("hypergradient", ["FirstOrder", "Adjoint"])
@pytest.mark.parametrize("size", ["10M", "60M"])
def test_planned_memory_is_within_a_fifth_of_the_measured(size, hypergradient, tmp_path):
    assert compare(tmp_path, size, hypergradient)["ratio"] == pytest.approx(1, abs=0.2)
