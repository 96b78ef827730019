"""A testbed that is built in a second: everything is real but the training of its base model."""

import pytest

from patcher_pl.testbed import build


@pytest.fixture(scope="session")
def short_training():
    """Four steps of training; also names another place in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.TRAINING, "num_steps", 4)
        patch.setitem(build.TRAINING, "num_warmup_steps", 1)
        yield


@pytest.fixture(scope="session")
def quick_testbed(short_training, tmp_path_factory):
    directory = tmp_path_factory.mktemp("testbed") / "quick"
    build.build_testbed(directory)
    return directory
