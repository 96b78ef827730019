"""One SLURM for all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    # Jobs find the interpreter that runs the tests.
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cluster.start()
    yield cluster
    cluster.stop()
