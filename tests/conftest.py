"""What every test may rely on: nothing outside of pytest's own folders is written."""

import os
from pathlib import Path

import pytest

import tests.typechecking  # noqa: F401  # The import hook of jaxtyping looks for it.

# Before torch starts its threads: tests run side by side, on models for which one is best.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the hub, whose library would try again for twenty seconds where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# The imports are inside: reports and other light tests need none of this.


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """Directory of a tiny random Llama."""
    from tests.families import build_family

    return build_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """Directory of a tiny random GPT-2: tied embeddings, dropout, Conv1D layers, no template."""
    from tests.families import build_family

    return build_family("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def rows(tmp_path):
    """Small harmless data sets; see `tests.tiny_runs.Rows`."""
    from tests.tiny_runs import Rows

    return Rows(tmp_path / "rows")
