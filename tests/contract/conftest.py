"""Runs a test once for every defense of the table."""

from functools import partial

import pytest

from tests.defense_table import TABLE, build


@pytest.fixture(params=TABLE, ids=lambda kind: kind.__name__)
def kind(request):
    """Class of a defense."""
    return request.param


@pytest.fixture
def claims(kind):
    """What it says of itself."""
    return TABLE[kind]


@pytest.fixture
def make(kind, llama):
    """Builds one on the tiny Llama; see `tests.defense_table.build`."""
    return partial(build, kind, llama)
