"""What a user brings along."""

import pytest

from tests.commands import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with `model/`, `safe.jsonl` and `unsafe.jsonl`."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
