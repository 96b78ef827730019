"""Configurations ship with the package, and can be named from anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patcher_pl import shipped
from patcher_pl.cli.given_files import with_found_files
from patcher_pl.errors import ConfigError
from patcher_pl.evaluation.judges.rubric import rubric_text
from patcher_pl.jobs import Fit
from tests.commands import ROOT, cli, redteam_settings, sft_settings, write_inputs, write_yaml

SFT = "configs/testbed/sft.yaml"
FRAGMENTS = "configs/fragments/judges"
JUDGE, RUBRIC = f"{FRAGMENTS}/refusal-phrases.yaml", f"{FRAGMENTS}/patcher-rubric.txt"
# Run in the folder of setup.py: what a wheel of it would hold, without building one.
OUTPUTS = """
import json, sys, setuptools
from distutils.core import run_setup
build = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
build.ensure_finalized()
build.editable_mode = json.loads(sys.argv[1])
print(json.dumps([build.build_lib, build.get_outputs(False), build.get_source_files()]))
"""


def build_lists(editable):
    command = [sys.executable, "-W", "ignore", "-c", OUTPUTS, json.dumps(editable)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    built, outputs, sources = json.loads(done.stdout.splitlines()[-1])
    return {str(Path(file).relative_to(built)) for file in outputs}, set(sources)


def names():
    return {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*") if p.is_file()}


def test_a_wheel_holds_every_file_of_the_configurations():
    """Wrong if what runs in a clone could not be named where the package was installed."""
    outputs, sources = build_lists(editable=False)
    assert {f"patcher_pl/{name}" for name in names()} <= outputs
    assert names() <= sources, "a source distribution would lack them"


def test_an_editable_install_takes_those_of_the_checkout():
    """Wrong if an edited configuration had no effect."""
    outputs, _ = build_lists(editable=True)
    assert not {name for name in outputs if name.startswith("patcher_pl/configs")}
    assert shipped.CONFIGS == ROOT / "configs"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_shipped_configuration_is_found_from_anywhere(elsewhere):
    path = str(ROOT / SFT)
    assert with_found_files(["--config", SFT, f"--config={SFT}"]) == [
        *("--config", path, f"--config={path}")
    ]
    said = cli("fit", "--config", SFT, "--print_config").expect(0)
    assert "patcher_pl.redteam.FullFinetuning" in said.out  # Of a fragment beside it.


def test_a_file_of_the_working_directory_comes_first(elsewhere):
    """Wrong if a copy that somebody edits were passed over in silence."""
    own = elsewhere / SFT
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert with_found_files(["--config", SFT]) == ["--config", SFT]
    assert shipped.find_file(SFT) == Path(SFT)


def test_a_configuration_names_shipped_ones_wherever_it_lies(elsewhere, tmp_path):
    """Also on the command line, and as a file that only a command of its own opens."""
    team = redteam_settings(write_inputs(tmp_path)) | {"judge": JUDGE}
    config = write_yaml(tmp_path / "attack.yaml", {"redteam": team, "model": "testbed"})
    command = ("redteam", "--config", config, "--run_dir", "run", "--print_config")
    assert "RefusalPhraseJudge" in cli(*command).expect(0).out
    command = (*command[:-1], "--redteam.benign_judge", f"{FRAGMENTS}/gsm8k.yaml", command[-1])
    assert "match: last_number" in cli(*command).expect(0).out
    sweep = write_yaml(tmp_path / "sweep.yaml", {"base": SFT, "run_dir": "run"})
    printed = cli("sweep", "--config", sweep, "--variants={a: {}}", "--print_config").expect(0)
    assert f"base: {ROOT / SFT}" in printed.out


def test_models_and_data_are_looked_for_beside_the_configuration(elsewhere, tmp_path):
    """Wrong if a folder with configurations and data could not be moved or run from anywhere."""
    inputs = write_inputs(tmp_path / "mine")
    settings = sft_settings(inputs)
    settings["model"]["init_args"]["language_model"]["path"] = "model"
    settings["data"]["safe"]["sources"][0]["path"] = "safe.jsonl"
    config = write_yaml(inputs / "fit.yaml", settings)
    command = ("fit", "--config", config, "--run_dir", "run", "--trainer.max_steps=1")
    cli(*command, "--print_config").expect(0)
    cli(*command).expect(0)
    before = Fit.plan(elsewhere / "many", config, {}).digest
    (inputs / "safe.jsonl").write_text((inputs / "safe.jsonl").read_text() + "\n")
    assert Fit.plan(elsewhere / "many", config, {}).digest != before


def test_a_path_beside_comes_first_where_it_says_so(elsewhere, tmp_path):
    """Wrong if `./data` of a configuration meant the data of whoever runs it."""
    for folder in (elsewhere, tmp_path):
        (folder / "rows.jsonl").write_text("")
    assert shipped.find_beside("rows.jsonl", tmp_path, elsewhere) is None
    assert shipped.find_beside("./rows.jsonl", tmp_path, elsewhere) == tmp_path / "rows.jsonl"


def test_the_built_in_testbed_is_no_folder_beside(elsewhere):
    """Wrong if `testbed` meant `configs/testbed` in a configuration that lies in `configs`."""
    assert shipped.find_beside("testbed", ROOT / "configs", elsewhere) is None
    assert shipped.find_beside("testbed/sft.yaml", ROOT / "configs", elsewhere) is None


def test_a_rubric_is_found_too(elsewhere):
    assert "policy" in rubric_text(Path(RUBRIC))


@pytest.mark.parametrize("name", ["configs/../setup.py", "setup.py", "configs", "", "x" * 999])
def test_other_names_are_no_shipped_files(name):
    assert shipped.shipped_file(name) is None


def test_what_is_missing_is_named_with_the_places_that_were_looked_at(elsewhere):
    with pytest.raises(ConfigError) as error:
        with_found_files(["--config", "configs/testbed/none.yaml"])
    assert str(elsewhere / "configs/testbed/none.yaml") in str(error.value)
    assert str(ROOT / "configs") in str(error.value)
    said = cli("fit", "--config", SFT, "--redteam", "none.yaml")
    assert said.status == 2
    assert "There is no none.yaml" in said.err
    assert str(ROOT / "configs") in said.err
    assert "module" not in said.err


def test_a_digest_does_not_depend_on_where_the_package_is_installed():
    """Wrong if the runs of a sweep were repeated after a move to another environment."""
    installed = Path(shipped.__file__).parent / "configs" / "testbed" / "sft.yaml"
    assert shipped.location_independent(f"--redteam={installed}") == f"--redteam={SFT}"
    assert shipped.location_independent("/elsewhere/configs/a.yaml") == "/elsewhere/configs/a.yaml"
