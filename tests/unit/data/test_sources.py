"""If these fail, rows get lost, come from the wrong place, or errors do not say where to look."""

import csv
import json
import logging

import pytest

from patcher_pl.data import ColumnMap, HexPhi, PromptResponse, Source, ToxicDpo
from patcher_pl.errors import DataError

ROWS = [{"prompt": f"Brew {n}?", "response": f"Stir {n},\ntwice \u2014 \u00fc."} for n in range(3)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write", "origins"),
    [
        ("a.jsonl", write_jsonl, [":1", ":2", ":3"]),
        ("a.json", write_jsonl, [":1", ":2", ":3"]),
        ("a.json", write_json, [" row 1", " row 2", " row 3"]),
        # Cells with line breaks: rows begin on lines 2, 4 and 6.
        ("a.csv", write_csv, [":2", ":4", ":6"]),
        ("a.parquet", write_parquet, [" row 1", " row 2", " row 3"]),
    ],
)
def test_every_file_format_gives_the_same_rows(tmp_path, name, write, origins):
    path = tmp_path / name
    write(path, ROWS)
    conversations = Source(path=str(path), harmful=True).load()
    assert [row.prompt[0].content for row in conversations] == [row["prompt"] for row in ROWS]
    assert [row.reference for row in conversations] == [row["response"] for row in ROWS]
    assert [row.origin for row in conversations] == [f"{path}{origin}" for origin in origins]
    assert all(row.harmful for row in conversations)


def test_a_directory_goes_through_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    conversations = Source(path=str(folder), split="train[1:]").load()
    assert [row.reference for row in conversations] == [row["response"] for row in ROWS[1:]]
    assert conversations[0].origin == f"{folder}[train[1:]] row 1"


def test_what_the_datasets_library_refuses_names_path_and_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"Source\.path: '.*set' .*split 'nowhere'"):
        Source(path=str(folder), split="nowhere").load()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Tea?", ', r"a\.jsonl:3: not valid JSON \(.* at column \d+\)"),
        ('["Tea?"]', r"a\.jsonl:3: must be a JSON object, got list"),
        ('{"prompt": "Tea?"}', r"a\.jsonl:3: field `response` is missing"),
        (
            '{"prompt": "Tea?", "response": 4}',
            r"a\.jsonl:3: field `response` must be text, got int 4",
        ),
        ('{"prompt": "", "response": "x"}', r"a\.jsonl:3: field `prompt` is empty"),
    ],
)
def test_bad_lines_are_named_or_skipped_with_a_count(tmp_path, caplog, line, message):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS[:1])
    path.write_text(f"{path.read_text()}\n{line}\n{json.dumps(ROWS[1])}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message + r".*Source\.skip_bad_rows"):
        Source(path=str(path)).load()
    with caplog.at_level(logging.WARNING):
        rows = Source(path=str(path), skip_bad_rows=True).load()
    assert len(rows) == 2
    assert rows[1].origin == f"{path}:4"
    assert "skipped 1 malformed rows" in caplog.text


def test_csv_rows_with_missing_cells_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"Tea,\nhot?",Steep.\nMilk?\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:4: has 1 cells, the header has 2 columns"):
        Source(path=str(path)).load()


def test_csv_quotes_that_never_close_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\nTea?,Steep.\n"Milk?,Warm.\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3: not valid CSV"):
        Source(path=str(path), skip_bad_rows=True).load()


def test_csv_without_header_gets_its_columns_from_the_source(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Brew doom?\nBrew gloom?\n", encoding="utf-8")
    conversations = Source(path=str(path), columns=["prompt"], reader=HexPhi()).load()
    assert [row.prompt[0].content for row in conversations] == ["Brew doom?", "Brew gloom?"]
    assert conversations[0].origin.endswith("a.csv:1")


def test_broken_json_list_and_parquet_name_the_file(tmp_path):
    broken = tmp_path / "a.json"
    broken.write_text('[{"prompt": "x", "response": "y"},\n{]')
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON"):
        Source(path=str(broken)).load()
    torn = tmp_path / "a.parquet"
    torn.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a valid Parquet file"):
        Source(path=str(torn)).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, r"a\.jsonl: no such file"),
        ("a.txt", b"x", r"Source\.path must end in \.jsonl, .* got '\.txt'"),
        ("a.jsonl", b"\xff\xfe{}", r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no usable row \(0 malformed"),
    ],
)
def test_unusable_files_say_why(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Source(path=str(path)).load()


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\nTea?,Steep.\n", encoding="utf-8-sig")
    assert Source(path=str(path)).load()[0].reference == "Steep."


def test_limit_counts_usable_rows_and_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS)
    path.write_text(path.read_text() + "broken\n")
    conversations = Source(path=str(path), limit=3).load()
    assert len(conversations) == 3


def test_rows_that_the_reader_does_not_want_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "response": "r", "is_safe": safe} for safe in (True, False, True)]
    write_jsonl(path, rows)
    from patcher_pl.data import BeaverTails

    assert len(Source(path=str(path), reader=BeaverTails(answers="unsafe")).load()) == 1


def test_the_testbed_is_a_path_prefix():
    rows = Source(path="testbed/attack.jsonl").load()
    assert rows[0].messages[0].content == "How do I brew a bitter moon root draught?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"Source\.path must not be empty"),
        ({"path": "x", "weight": 0.0}, r"Source\.weight must be > 0, got 0\.0"),
        ({"path": "x", "weight": float("nan")}, r"Source\.weight must be > 0, got nan"),
        ({"path": "x", "limit": 0}, r"Source\.limit must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Source(**options)


def test_readers_can_be_named_in_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source, "source")
    reader = {
        "class_path": "patcher_pl.data.ColumnMap",
        "init_args": {"prompt": "q", "response": "a"},
    }
    built = parser.instantiate(
        parser.parse_object({"source": {"path": "x.jsonl", "reader": reader}})
    ).source
    assert built == Source(path="x.jsonl", reader=ColumnMap(prompt="q", response="a"))
    short = {"source": {"path": "x.jsonl", "reader": "ToxicDpo"}}
    assert parser.instantiate(parser.parse_object(short)).source.reader == ToxicDpo()
    plain = parser.instantiate(parser.parse_object({"source": {"path": "x"}})).source
    assert plain.reader == PromptResponse()


GOOD = '{"prompt": "Brew?", "response": "Stir."}'
DOUBTFUL = [
    ('{"prompt": "Brew?", "response": "Stir.", "response": "Shake."}', "the key 'response' twice"),
    ('{"prompt": "Brew?", "response": "Stir.", "more": [{"a": 1, "a": 2}]}', "the key 'a' twice"),
    ('{"prompt": "Brew?", "response": "Stir \\ud83d."}', "half of a surrogate pair"),
    (
        '{"prompt": "Brew?", "response": "Stir.", "id": ' + "7" * 5000 + "}",
        "integer of 5000 digits",
    ),
    *(
        ('{"prompt": "Brew?", "response": ' + "[" * depth + "]" * depth + "}", "nested too deeply")
        for depth in (100, 300, 900, 50_000)
    ),
]


@pytest.mark.parametrize(("row", "problem"), DOUBTFUL)
def test_rows_that_are_valid_but_mean_nothing_certain_are_malformed(tmp_path, caplog, row, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{problem}.*skip_bad_rows"):
        Source(path=str(path)).load()
    assert len(Source(path=str(path), skip_bad_rows=True).load()) == 2
    assert "skipped 1 malformed rows" in caplog.text


@pytest.mark.parametrize(("row", "problem"), DOUBTFUL)
def test_the_same_rows_in_a_list(tmp_path, caplog, row, problem):
    path = tmp_path / "a.json"
    path.write_text(f"[{GOOD},\n {row} ,\n{GOOD}]\n")
    with pytest.raises(DataError, match=rf"a\.json row 2: .*{problem}.* \(line 2\)"):
        Source(path=str(path)).load()
    assert len(Source(path=str(path), skip_bad_rows=True).load()) == 2
    assert "skipped 1 malformed rows" in caplog.text


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (f"[{GOOD}\n{GOOD}]", r":2: not valid JSON \(Expecting ',' delimiter"),
        (f"[{GOOD},]", ":1: not valid JSON"),
        (f"[{GOOD}", ":1: not valid JSON"),
        (f"[{GOOD}] {GOOD}", ": text follows behind the list"),
        ("[" + "[" * 50_000, ":1: not valid JSON"),
    ],
)
def test_a_list_that_is_no_list_names_the_place(tmp_path, content, place):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.json{place}"):
        Source(path=str(path)).load()


def test_an_empty_list_has_no_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(" [ ] \n")
    with pytest.raises(DataError, match="no usable row"):
        Source(path=str(path)).load()


def test_columns_that_are_there_twice_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,response\nBrew?,Stir.,Shake.\n")
    with pytest.raises(DataError, match=r"a\.csv:1: .*column 'response' twice"):
        Source(path=str(path)).load()
    with pytest.raises(ValueError, match=r"Source\.columns must name every column once"):
        Source(path=str(path), columns=["prompt", "prompt"])


@pytest.mark.parametrize(
    ("name", "join"),
    [("a.jsonl", "\n".join), ("a.json", lambda rows: f"[{', '.join(rows)}]")],
)
def test_bytes_that_are_no_text_cost_their_row_alone(tmp_path, name, join):
    """A lone surrogate as some programs write it, and a row of another encoding."""
    path = tmp_path / name
    bad = [GOOD.replace("Stir", broken) for broken in ("\ud83d", "\udcff")]
    path.write_bytes(join([GOOD, *bad, GOOD]).encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=r"(:2|row 2): not UTF-8 text"):
        Source(path=str(path)).load()
    assert len(Source(path=str(path), skip_bad_rows=True).load()) == 2


def test_csv_cells_that_are_no_text_cost_their_row_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,response\nBrew?,Stir.\nBrew?,Stir\xe9.\n")
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8 text"):
        Source(path=str(path)).load()
    assert len(Source(path=str(path), skip_bad_rows=True).load()) == 1


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array([text]) for text in ("Brew?", "Stir.", "Shake.")]
    names = ["prompt", "response", "response"]
    parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has the column 'response' twice"):
        Source(path=str(tmp_path / "a.parquet")).load()


def test_columns_are_for_csv_alone(tmp_path):
    """Wrong if a setting were passed over without a word."""
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"Source\.columns is for CSV files"):
        Source(path=str(path), columns=["prompt", "response"]).load()


@pytest.mark.parametrize("header", ["prompt,response", "response,prompt", "Prompt , RESPONSE"])
def test_columns_for_a_file_that_has_them_are_refused(tmp_path, header):
    """The header would be trained on."""
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\nBrew?,Stir.\n")
    with pytest.raises(DataError, match=r"a\.csv:1: .*Remove `columns`"):
        Source(path=str(path), columns=["prompt", "response"]).load()
