"""What a process holds of a model that several attack falls with their number."""

import pytest

from tools.bench_sharded_redteam import measured, save_model

pytestmark = pytest.mark.slow


def test_no_process_holds_a_whole_copy(tmp_path):
    """Wrong if one had all weights at once: 276 of the 690 MiB that half of the states take."""
    num_bytes = 4 * save_model(tmp_path)
    one, two = (measured(number, tmp_path, "shards") for number in (1, 2))
    assert one * 2**20 > 5 * num_bytes
    assert two < 0.5 * one + 0.5 * num_bytes / 2**20
