"""`results.schema.json` says what is written and what is read."""

import json
import math
from dataclasses import MISSING, fields
from importlib.resources import files

import pytest
from jsonschema import Draft202012Validator

from patcher_pl.reports import Curve, Overlap, Results, Sample
from patcher_pl.reports.results import SCHEMA_VERSION
from patcher_pl.reports.searches import Attempt, SearchOutcome
from tests.campaigns import ATTACKS, campaign


@pytest.fixture(scope="module")
def schema():
    return json.loads((files("patcher_pl.reports") / "results.schema.json").read_text())


def test_it_is_a_schema(schema):
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["maximum"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *((Results, None), (Curve, "curve"), (Sample, "sample"), (Overlap, "overlap")),
        *((SearchOutcome, "search"), (Attempt, "attempt")),
    ],
)
def test_it_knows_every_field(schema, kind, place):
    """Wrong if a field were written that nobody else could know of."""
    described = schema if place is None else schema["$defs"][place]
    assert set(described["properties"]) == {entry.name for entry in fields(kind)}
    needed = {
        entry.name
        for entry in fields(kind)
        if entry.default is MISSING and entry.default_factory is MISSING
    }
    # A file may leave out what it ran on; a program that writes one may not.
    assert set(described["required"]) == needed - {"environment"}


def test_what_is_saved_keeps_to_it(schema, curve, tmp_path):
    results = campaign(attacks=ATTACKS[:3], num_seeds=2, num_prompts=5)
    odd = curve("tar", None, [], None, error="RuntimeError: full")
    shared = {"num_first": 3, "num_second": 2, "shared_prompts": 1, "shared_rows": 0}
    overlap = Overlap(first="defender", second="red team", **shared)
    search = SearchOutcome(
        defense="tar",
        num_trials=2,
        budget=160,
        attempts=[
            Attempt(attack="a", settings={"lr": 0.1}, strength=0.5, source="grid"),
            Attempt(attack="b", settings={}, strength=math.nan, source="search", number=0),
        ],
    )
    written = Results(
        curves=[*results.curves, odd], environment={}, overlap=[overlap], searches=[search]
    )
    written.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").overlap == [overlap]
    assert Results.load(tmp_path / "results.json").searches == [search]
    content = json.loads((tmp_path / "results.json").read_text())
    Draft202012Validator(schema).validate(content)


@pytest.mark.parametrize(
    "changes",
    [{"asr": [0, 37.5]}, {"seed": "a"}, {"scores": [[6], [1]]}, {"steps_to_break": -1}],
)
def test_what_makes_no_sense_is_refused(schema, curve, changes, tmp_path):
    Results(curves=[curve("sft", None, [0, 1], 20)], environment={}).save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    content["curves"][0] |= changes
    assert not Draft202012Validator(schema).is_valid(content)
