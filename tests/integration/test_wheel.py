"""A wheel, installed away from the clone, does what the clone does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from patcher_pl.reports import Results
from tests.commands import QUIET, ROOT

pytestmark = pytest.mark.slow

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
QUICK = [f"--trainer.{name}={value}" for name, value in {**QUIET, "max_steps": 3}.items()]
SHORT_ATTACK = ["--redteam.stop_after_break=0", "--redteam.prompts.limit=4", "--redteam.benign_prompts.limit=4"]  # fmt: skip


def run(*command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment with a wheel of this checkout, and what else the tests run with."""
    place = tmp_path_factory.mktemp("wheel")
    checkout = place / "checkout"  # Building leaves files in the folder it builds from.
    checkout.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, checkout)
    for name in ("patcher_pl", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", place)
    run(*pip, "wheel", ".", *offline, folder=checkout)
    venv.create(place / "venv")
    python = place / "venv" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=place)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=place).strip())  # fmt: skip
    # Comes behind what is installed, and lines of other .pth files, such as this checkout's, are not read.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_it_is_the_wheel_that_runs(installed, elsewhere):
    """Wrong if the tests below ran the checkout."""
    said = run(installed, "-c", "from patcher_pl import shipped; print(shipped.CONFIGS)", folder=elsewhere)  # fmt: skip
    assert Path(said.strip()).is_relative_to(installed.parents[1])
    shipped = {p.relative_to(said.strip()) for p in Path(said.strip()).rglob("*") if p.is_file()}
    configs = ROOT / "configs"
    assert shipped == {p.relative_to(configs) for p in configs.rglob("*") if p.is_file()}


def test_a_shipped_configuration_is_run(installed, elsewhere):
    """The main job: training, and the attack that a fragment describes."""
    command = (installed, "-m", "patcher_pl", "fit", "--config", "configs/testbed/sft.yaml", *QUICK)
    run(*command, "--probe_every_n_steps=null", *SHORT_ATTACK, folder=elsewhere)
    (curve,) = Results.load(elsewhere / "runs" / "testbed-sft" / "results.json").curves
    assert curve.error is None


def test_a_model_of_ones_own_is_hardened(installed, elsewhere):
    """Data of the testbed stand in; the program is called by its own name."""
    program = installed.with_name("patcher-pl")
    run(program, "testbed", "--out", "given", folder=elsewhere)
    data = ("--safe", "given/data/safe.jsonl", "--unsafe", "given/data/unsafe.jsonl")
    run(program, "init", "mine", "--model", "given/model", *data, folder=elsewhere)
    command = (program, "fit", "--config", "mine/fit.yaml", *QUICK, "--control=false")
    run(*command, "--model.init_args.num_sft_steps=1", folder=elsewhere)
    assert (elsewhere / "hardened" / "model" / "model.safetensors").is_file()
