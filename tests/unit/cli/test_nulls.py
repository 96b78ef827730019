"""What a class has can be switched off on the command line."""

import pytest
import yaml

from tests.commands import ROOT, cli

CARRIED = ROOT / "configs" / "testbed" / "carried.yaml"
ATTACKER = "model.init_args.attacker.init_args"


def attacker_of(*arguments):
    told = cli("fit", "--config", CARRIED, *arguments, "--print_config").expect(0).out
    return yaml.safe_load(told)["model"]["init_args"]["attacker"]["init_args"]


@pytest.mark.parametrize("given", [[f"--{ATTACKER}.carry=null"], [f"--{ATTACKER}.carry", "null"]])
def test_null_is_no_text(given):
    """Wrong if `=null` were refused, or something else were changed with it."""
    before, after = attacker_of(), attacker_of(*given)
    assert before.pop("carry")["restart_every"] == 40
    assert after.pop("carry") is None
    assert after == before


def test_what_comes_later_counts():
    switched = [f"--{ATTACKER}.carry=null", f"--{ATTACKER}.carry.restart_every=3"]
    assert attacker_of(*switched)["carry"]["restart_every"] == 3
    assert attacker_of(*reversed(switched))["carry"] is None


def test_an_option_of_an_option_of_a_class():
    name = f"{ATTACKER}.optimizer.init_args.state_dtype"
    given = [f"--{name}=bfloat16", f"--{name}=null"]
    assert attacker_of(*given[:1])["optimizer"]["init_args"]["state_dtype"] == "bfloat16"
    assert attacker_of(*given)["optimizer"]["init_args"]["state_dtype"] is None
