"""Options that a command hands on to `fit` arrive there as they were given."""

import json
from pathlib import Path

import pytest

from patcher_pl.cli.ablate import run_ablate
from patcher_pl.cli.compare import run_compare
from patcher_pl.cli.main import function_parser
from patcher_pl.cli.redteam import run_redteam
from patcher_pl.cli.scale import run_scale
from patcher_pl.cli.sweep import run_sweep
from patcher_pl.jobs.fit import as_option

TESTBED = Path(__file__).parents[3] / "configs" / "testbed"
GIVEN = {
    "model.init_args.scheduler": {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": 80},
    },
    "trainer.callbacks": [{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}],
    "model.init_args.optimizer.init_args.lr": 1e-3,
    "data.batch_size": 4,
    "data.packing": True,
    "run_dir": "runs/here",
    "redteam": None,
}
HARDENING = {"budgets": [8], "variants": {"one": GIVEN}}
CONTENDER = {"fit": str(TESTBED / "sft.yaml"), "options": GIVEN, "space": {"x": [GIVEN]}}


@pytest.mark.parametrize(
    ("command", "config", "changed", "handed_on"),
    [
        (run_compare, "searched", {"options": GIVEN}, lambda got: got.options),
        (
            run_compare,
            "searched",
            {"defenses": {"sft": CONTENDER}},
            lambda got: got.defenses["sft"].options,
        ),
        (
            run_compare,
            "searched",
            {"defenses": {"sft": CONTENDER}},
            lambda got: got.defenses["sft"].space["x"][0],
        ),
        (run_scale, "scaling", {"options": GIVEN}, lambda got: got.options),
        (run_sweep, "headline", {"variants": {"one": GIVEN}}, lambda got: got.variants["one"]),
        (run_ablate, "ablate", {"trained": GIVEN}, lambda got: got.trained),
        (run_ablate, "ablate", {"hardening": HARDENING}, lambda got: got.hardening.variants["one"]),
        (run_redteam, "redteam", {"fit_options": GIVEN}, lambda got: got.fit_options),
    ],
)
def test_they_get_no_arguments_that_nobody_gave(command, config, changed, handed_on):
    """Wrong if a class came with all arguments that it may have: `fit` refuses a schedule's optimizer."""
    parser = function_parser("any", command)
    given = [f"--{name}={json.dumps(value)}" for name, value in changed.items()]
    file = str(TESTBED / f"{config}.yaml")
    options = parser.parse_args(["--config", file, "--run_dir", "run", *given])
    found = handed_on(parser.instantiate(options))
    assert dict(found) == GIVEN
    assert (
        json.loads(as_option(found["model.init_args.scheduler"]))
        == (GIVEN["model.init_args.scheduler"])
    )
