"""Every experiment below configs/ can be planned without network, weights or much memory."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.commands import ROOT, command_line
from tests.configs.test_configs import of_kind

# Parameters as published with the models.
NUM_PARAMETERS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
}


# Of this process alone: that of the tests has had other children.
_AND_SAY_ITS_MEMORY = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", of_kind("fit"))
def test_an_experiment_is_planned(path, tmp_path):
    """In a process of its own, with 2 GB at most: wrong if anything large were allocated."""
    out = tmp_path / "plan.json"
    command = [
        *(sys.executable, "-c", _AND_SAY_ITS_MEMORY),
        *command_line("plan", "--config", path, "--json", out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if "ConcurrentAttacker" in path.read_text(encoding="utf-8"):
        assert (done.returncode, out.exists()) == (2, False)
        assert "ConcurrentAttacker" in done.stderr
        return
    plan = json.loads(out.read_text())
    assert done.returncode == (0 if plan["configured"]["fits"] else 2), done.stderr
    assert ("does not fit" in done.stderr) == (not plan["configured"]["fits"])
    assert int(done.stdout.split()[-1]) < 2 * 2**20
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = settings["model"]["init_args"]["language_model"]["path"]
    assert plan["num_parameters"] == NUM_PARAMETERS.get(model, plan["num_parameters"])
