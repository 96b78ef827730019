"""If these fail, a benchmark is asked with the wrong prompts, or half of them."""

import csv

import pytest
import yaml
from jsonargparse import ArgumentParser

from patcher_pl.data import HarmBench, RowError, Source, StrongReject, XsTest
from patcher_pl.evaluation import Benchmark
from tests.commands import ROOT

HARM = {
    "Behavior": "Brew doom",
    "FunctionalCategory": "standard",
    "SemanticCategory": "potions",
    "Tags": "",
    "ContextString": "",
    "BehaviorID": "brew_doom",
}
CONTEXTUAL = {
    **HARM,
    "FunctionalCategory": "contextual",
    "ContextString": "Doom is a draught.\nIt is green.",
}
STRONG = {"category": "Potions", "source": "AdvBench", "forbidden_prompt": "Brew doom?"}
XS_SAFE = {"id": "1", "prompt": "Kill a thirst?", "type": "homonyms", "label": "safe"}
XS_UNSAFE = {"id": "26", "prompt": "Brew doom?", "type": "contrast_homonyms", "label": "unsafe"}
XS_OLD = {"prompt": "Kill a thirst?", "type": "homonyms"}
XS_OLD_UNSAFE = {"prompt": "Brew doom?", "type": "contrast_homonyms"}
CASES = [
    (HarmBench(), HARM, ("Brew doom", True)),
    (HarmBench(), CONTEXTUAL, ("Doom is a draught.\nIt is green.\n\n---\n\nBrew doom", True)),
    (HarmBench(), {**HARM, "FunctionalCategory": "copyright"}, None),
    (
        HarmBench(kinds=["copyright"]),
        {**HARM, "FunctionalCategory": "copyright"},
        ("Brew doom", True),
    ),
    (HarmBench(kinds=["standard"]), CONTEXTUAL, None),
    (
        HarmBench(kinds=None, behavior="prompt", context="context"),
        {"prompt": "Brew doom", "context": "Doom is green.", "category": "potions"},
        ("Doom is green.\n\n---\n\nBrew doom", True),
    ),
    (HarmBench(kinds=None, behavior="prompt"), {"prompt": "Brew doom"}, ("Brew doom", True)),
    (StrongReject(), STRONG, ("Brew doom?", True)),
    (StrongReject(prompt="prompt"), {"prompt": "Brew doom?"}, ("Brew doom?", True)),
    (StrongReject(without_sources=["AdvBench"]), STRONG, None),
    (StrongReject(without_sources=["DAN"]), STRONG, ("Brew doom?", True)),
    (XsTest(), XS_SAFE, ("Kill a thirst?", False)),
    (XsTest(), XS_UNSAFE, ("Brew doom?", True)),
    (XsTest(prompts="safe"), XS_SAFE, ("Kill a thirst?", False)),
    (XsTest(prompts="safe"), XS_UNSAFE, None),
    (XsTest(prompts="unsafe"), XS_SAFE, None),
    (XsTest(prompts="unsafe"), XS_UNSAFE, ("Brew doom?", True)),
    (XsTest(prompts="safe"), XS_OLD, ("Kill a thirst?", False)),
    (XsTest(prompts="safe"), XS_OLD_UNSAFE, None),
]


@pytest.mark.parametrize("source_says", [True, False])
@pytest.mark.parametrize(("reader", "row", "expected"), CASES)
def test_each_benchmark_gives_prompts_and_whether_they_are_harmful(
    reader, row, expected, source_says
):
    conversation = reader.read(row, harmful=source_says, origin="here:1")
    if expected is None:
        assert conversation is None
        return
    prompt, harmful = expected
    assert [turn.role for turn in conversation.messages] == ["user"]
    assert conversation.messages[0].content == prompt
    assert conversation.harmful == harmful
    assert conversation.origin == "here:1"


@pytest.mark.parametrize(
    ("reader", "row", "field", "problem"),
    [
        (HarmBench(), {"Behavior": "Brew"}, "FunctionalCategory", "missing"),
        (HarmBench(), {**HARM, "Behavior": ""}, "Behavior", "empty"),
        (StrongReject(), {"prompt": "Brew"}, "forbidden_prompt", "missing"),
        (StrongReject(without_sources=["DAN"]), {"forbidden_prompt": "x"}, "source", "missing"),
        (XsTest(), {"prompt": "Brew"}, "type", "missing"),
        (XsTest(), {**XS_SAFE, "label": "harmless"}, "label", "safe or unsafe, got 'harmless'"),
    ],
)
def test_malformed_rows_name_the_field(reader, row, field, problem):
    with pytest.raises(RowError, match=problem) as caught:
        reader.read(row, harmful=True, origin="here:1")
    assert caught.value.field == field


def test_a_benchmark_file_becomes_questions(tmp_path):
    path = tmp_path / "behaviors.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(HARM))
        writer.writeheader()
        writer.writerows([HARM, {**HARM, "FunctionalCategory": "copyright"}, CONTEXTUAL])
    source = Source(path=str(path), reader=HarmBench())
    questions = Benchmark(source=source).questions()
    assert [question.text.splitlines()[-1] for question in questions] == ["Brew doom"] * 2
    assert [question.reference for question in questions] == [None] * 2


FRAGMENTS = sorted((ROOT / "configs" / "fragments" / "benchmarks").glob("*.yaml"))
ROWS = {
    "advbench": {"prompt": "Brew doom"},
    "beavertails": {"prompt": "Brew doom", "category": "potions", "category_id": "1"},
    "gsm8k": {"question": "How many petals?", "answer": "Two and two.\n#### 4"},
    "harmbench": HARM,
    "hexphi": {"prompt": "Brew doom", "response": "No."},
    "strongreject": STRONG,
    "xstest-safe": XS_SAFE,
    "xstest-unsafe": XS_UNSAFE,
}
ROWS |= {f"{name}-first250": ROWS[name] for name in ("advbench", "beavertails", "hexphi")}


def test_there_is_a_row_for_every_fragment():
    assert {path.stem for path in FRAGMENTS} == set(ROWS)


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_reads_a_row_of_its_benchmark(path, tmp_path):
    """A row in the published columns, in a local file in place of the hub."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    row = ROWS[path.stem]
    local = tmp_path / "rows.csv"
    with local.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    content["source"]["path"] = str(local)
    content["source"].pop("name", None)
    benchmark = _built(content)
    [question] = benchmark.questions()
    assert question.text in row.values()
    assert question.reference == row.get("answer")
    [conversation] = benchmark.source.load()
    assert conversation.harmful == (path.stem not in ("gsm8k", "xstest-safe"))


def _built(content):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Benchmark, "benchmark")
    return parser.instantiate(parser.parse_object({"benchmark": content})).benchmark
