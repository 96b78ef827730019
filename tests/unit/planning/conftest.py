from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.commands import patcher_settings, write_inputs, write_yaml


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def write_config(inputs) -> Callable[..., Path]:
    """Writes the configuration of a Patcher run, with changes to the model's settings."""

    def write(folder: Path, model) -> Path:
        settings = yaml.safe_load(yaml.safe_dump(patcher_settings(inputs)))
        settings["run_dir"] = str(folder / "run")
        changes = {**model}
        language_model = settings["model"]["init_args"]["language_model"]
        # With checkpointing, there is only one way to rehearse.
        language_model |= {"chat": {"max_length": 32}, "gradient_checkpointing": True}
        language_model |= changes.pop("language_model", {})
        settings["model"]["init_args"] |= changes
        return write_yaml(folder / "config.yaml", settings)

    return write


@pytest.fixture
def config(write_config, tmp_path) -> Callable[..., Path]:
    """Writes a configuration into the folder of the test."""
    return lambda model=None: write_config(tmp_path, model or {})
