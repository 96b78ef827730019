"""A redacted report holds the figures, and nothing that was said."""

from dataclasses import replace

import pytest

from patcher_pl.cli.main import main
from patcher_pl.reports import Overlap, Results
from tests.campaigns import ATTACKS, campaign

SECRETS = ["SECRET-TEMPLATE", "SECRET-COMMAND", "SECRET-ERROR", "SECRET-ROW"]


@pytest.fixture
def results():
    found = campaign(attacks=ATTACKS[:3], num_seeds=2, num_prompts=5)
    failed = replace(found.curves[0], error="DataError: SECRET-ERROR is too long")
    shared = {"num_first": 3, "num_second": 2, "shared_prompts": 1, "shared_rows": 0}
    return replace(
        found,
        curves=[failed, *found.curves[1:]],
        settings={"redteam": {"asking": {"template": "SECRET-TEMPLATE {prompt}"}}},
        environment={**found.environment, "command": ["SECRET-COMMAND"]},
        overlap=[Overlap(first="a", second="b", **shared, example="SECRET-ROW")],
    )


def written(results, folder, *options):
    results.save(folder / "results.json")
    out = folder / "page.html"
    assert main(["report", str(folder), "--out", str(out), *options]) == 0
    return "".join((folder / f"page.{end}").read_text() for end in ("html", "csv", "md", "tex"))


def test_no_answer_and_no_prompt_is_left(results, tmp_path):
    """Searches everything that was written for everything that was said."""
    said = {
        text
        for curve in results.curves
        for sample in curve.samples
        for text in (sample.answer, sample.prompt)
        if text
    }
    assert len(said) > 5
    shown = written(results, tmp_path, "--num_samples", "100")
    assert any(text in shown for text in said), "else this would test nothing"
    assert all(secret in shown for secret in SECRETS if secret != "SECRET-ROW")
    hidden = written(results, tmp_path, "--num_samples", "100", "--redact", "true")
    assert not [text for text in {*said, *SECRETS} if text in hidden]
    assert "DataError" in hidden


def test_figures_stay(results, tmp_path):
    whole, hidden = (written(results, tmp_path, *options) for options in ((), ("--redact", "true")))
    table = whole[whole.index("attack,") :]
    assert table[:2000] == hidden[hidden.index("attack,") :][:2000]
    assert Results.load(tmp_path / "results.json").curves[0].samples, "the results stay as they are"
