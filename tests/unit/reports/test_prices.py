"""What an attack costs, by the hardware of whoever runs it."""

import re
from dataclasses import replace

import pytest

from patcher_pl.cli.report import run_report_command
from patcher_pl.errors import ConfigError
from patcher_pl.reports.overview import overview
from patcher_pl.reports.price_table import price_table
from patcher_pl.reports.prices import Prices, Tier
from tests.campaigns import ATTACKS, campaign
from tests.commands import ROOT, write_yaml

# A petaFLOP/s each, of which half is used: 1.8e18 operations per hour.
TIER = Tier(name="lab", num_devices=4, peak_tflops=1000, utilization=0.5, price_per_hour=3.0)


def test_hours_and_prices_are_those_of_all_devices():
    flops = 3.6e18
    assert TIER.device_hours(flops) == pytest.approx(2.0)
    assert TIER.hours(flops) == pytest.approx(0.5)
    assert TIER.price(flops) == pytest.approx(6.0)


@pytest.fixture
def curves(curve):
    flops = [0.0, 1.8e18, 3.6e18]
    broken = curve("sft", None, [0.0, 0.2, 0.9], 40, attack_flops=flops)
    held = curve("patcher", 40, [0.0, 0.0, 0.1], None, attack_flops=flops)
    return [broken, held]


def test_what_held_costs_more_than_was_measured(curves):
    """Wrong if the horizon of a defense that never broke passed for its price."""
    found = price_table(overview(curves), Prices(tiers=[TIER], currency="EUR"))
    rows = {row["defense"]: row for _, row in found.cells.iterrows()}
    assert (rows["SFT"]["lab: hours"], rows["SFT"]["lab: EUR"]) == ("0.5", "6")
    held = rows["Patcher, k1 = 40"]
    assert (held["lab: hours"], held["lab: EUR"]) == ("> 0.5", "> 6")
    assert "4 x 1000 TFLOP/s at 50%, 3 EUR per device and hour" in found.caption


def test_costs_that_nobody_counted_make_no_table(curves):
    uncounted = [replace(curve, attack_flops=[]) for curve in curves]
    assert price_table(overview(uncounted), Prices(tiers=[TIER])) is None


def test_the_page_has_them_from_a_file(tmp_path):
    campaign(attacks=ATTACKS[:2], num_seeds=2, num_prompts=5).save(tmp_path / "results.json")
    out = tmp_path / "page.html"
    prices = ROOT / "configs" / "fragments" / "prices.yaml"
    run_report_command([str(tmp_path), "--out", str(out), "--prices", str(prices)])
    page = out.read_text()
    assert "Cost to break in time and money" in page
    assert "one RTX 4090: hours" in page
    run_report_command([str(tmp_path), "--out", str(out)])
    assert "time and money" not in out.read_text()


def test_prices_that_cannot_be_are_refused(tmp_path):
    tier = {"name": "lab", "peak_tflops": 100, "price_per_hour": 1.0}
    for content, message in [
        ({"tiers": []}, r"Prices\.tiers must be at least one"),
        ({"tiers": [tier, tier]}, r"Prices\.tiers must be at least one, with names of their own"),
        (
            {"tiers": [tier | {"utilization": 1.5}]},
            r"Tier\.utilization must be in \(0, 1\], got 1\.5",
        ),
        ({"tiers": [tier | {"peak_tflops": 0}]}, r"Tier\.peak_tflops must be > 0, got 0"),
        ({"tiers": [tier | {"num_devices": 0}]}, r"Tier\.num_devices must be >= 1"),
        ({"tiers": [tier | {"price_per_hour": -1}]}, r"Tier\.price_per_hour must be >= 0"),
    ]:
        file = write_yaml(tmp_path / "prices.yaml", content)
        with pytest.raises(ConfigError) as raised:
            run_report_command([str(tmp_path), "--prices", str(file)])
        assert re.search(message, str(raised.value)), str(raised.value)
