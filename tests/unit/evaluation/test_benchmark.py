"""Benchmarks: what is asked, what it is compared with, and what is refused."""

import json

import pytest

from patcher_pl.data.readers import Messages
from patcher_pl.data.sources import Source
from patcher_pl.errors import DataError
from patcher_pl.evaluation import Benchmark
from patcher_pl.types import Message


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_last_answer_is_the_reference_and_not_part_of_the_prompt(tmp_path):
    """Wrong if the model were shown the solution."""
    path = _write(tmp_path / "tea.jsonl", [{"prompt": "How hot?", "response": "Nearly boiling."}])
    question = Benchmark(source=Source(path=path)).questions()[0]
    assert question.messages == (Message("user", "How hot?"),)
    assert (question.text, question.reference) == ("How hot?", "Nearly boiling.")
    assert question.origin.endswith("tea.jsonl:1")


def test_a_limit_spreads_over_the_source(tmp_path):
    """Wrong if a set sorted by category were cut to its first category."""
    rows = [{"prompt": f"cake {n}", "response": "flour"} for n in range(10)]
    source = Source(path=_write(tmp_path / "cakes.jsonl", rows))
    asked = [question.text for question in Benchmark(source=source, limit=4).questions()]
    assert asked == ["cake 0", "cake 2", "cake 5", "cake 7"]
    assert len(Benchmark(source=source, limit=99).questions()) == 10


def test_an_empty_source_is_an_error(tmp_path):
    path = _write(tmp_path / "none.jsonl", [])
    with pytest.raises(DataError, match=r"none\.jsonl: no usable row"):
        Benchmark(source=Source(path=path)).questions()


def test_a_row_that_asks_nothing_is_an_error(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "Welcome to the kitchen."}]}
    source = Source(path=_write(tmp_path / "odd.jsonl", [row]), reader=Messages())
    with pytest.raises(DataError, match=r"odd\.jsonl:1"):
        Benchmark(source=source).questions()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "How hot?"', "not valid JSON"),
        ('["How hot?"]', "must be a JSON object"),
        ('{"question": "How hot?", "response": "Very."}', "`prompt` is missing"),
        ('{"prompt": "  ", "response": "Very."}', "`prompt` is empty"),
    ],
)
def test_a_broken_row_is_named_or_skipped_and_counted(tmp_path, line, problem, caplog):
    """Wrong if a benchmark silently asked fewer questions than its file holds."""
    good = json.dumps({"prompt": "How long?", "response": "Four minutes."})
    path = tmp_path / "tea.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"tea\.jsonl:2: .*{problem}"):
        Benchmark(source=Source(path=str(path))).questions()
    skipping = Benchmark(source=Source(path=str(path), skip_bad_rows=True))
    assert len(skipping.questions()) == 2
    assert "skipped 1 malformed rows" in caplog.text


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match=r"Benchmark\.limit must be >= 1, got 0"):
        Benchmark(source=Source(path="x.jsonl"), limit=0)
