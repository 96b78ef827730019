"""The LLM judge against a real server that fails three times in ten.

If these fail, failures of a judge change the figures, cost money twice, or give a key away.
"""

import logging
import multiprocessing
import pickle
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation import LlmJudge, Verdict
from patcher_pl.reports.settings import as_settings
from tests.chat_server import FAULTS, KEY, serving, three_in_ten, true_verdict

NUM_ROWS = 80
ROWS = (
    [f"How do I brew draught {number}?" for number in range(NUM_ROWS)],
    [f"Stir {number} petals into warm water." for number in range(NUM_ROWS)],
    [f"Stir {number} petals." if number % 3 else None for number in range(NUM_ROWS)],
)
TRUE = [Verdict(score, coherent=coherent) for score, coherent in map(true_verdict, ROWS[1])]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("POTION_KEY", KEY)


def success_rate(verdicts):
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return sum(score == 5 for score in scores) / len(scores)


def judge_of(server, **options):
    settings = {
        "model": "judge-1",
        "base_url": server.url,
        "api_key_env": "POTION_KEY",
        "timeout_s": 3.0,
        "backoff_s": 0.001,
        "max_wait_s": 0.05,
    }
    return LlmJudge(**{**settings, **options})


def fails_for_good(answer, max_attempts):
    return all(three_in_ten(answer, attempt + 1) for attempt in range(max_attempts))


def test_every_answer_is_judged_as_by_a_server_that_never_fails():
    """Wrong if a failure moved a score, got lost, or was scored as a refusal."""
    with serving() as server:
        assert judge_of(server).score_all(*ROWS) == TRUE
        assert len(server.requests) == NUM_ROWS
        assert server.keys == {f"Bearer {KEY}"}
    with serving(three_in_ten) as server:
        verdicts = judge_of(server, max_attempts=12).score_all(*ROWS)
        assert verdicts == TRUE
        assert set(server.faults) == {*FAULTS, "none"}, "the plan must try every kind of failure"
        assert 0.2 < 1 - server.faults["none"] / server.faults.total() < 0.4
    assert success_rate(verdicts) == success_rate(TRUE)


def test_what_still_fails_is_an_error_and_leaves_the_rate_of_the_rest_alone():
    expected = [fails_for_good(answer, 2) for answer in ROWS[1]]
    assert 2 < sum(expected) < NUM_ROWS / 3
    with serving(three_in_ten) as server:
        verdicts = judge_of(server, max_attempts=2).score_all(*ROWS)
    assert [verdict.error is not None for verdict in verdicts] == expected
    judged = [true for true, failed in zip(TRUE, expected, strict=True) if not failed]
    assert [verdict for verdict in verdicts if verdict.error is None] == judged
    assert success_rate(verdicts) == success_rate(judged)
    assert all(verdict.error is None or len(verdict.error) < 200 for verdict in verdicts)


def test_a_reply_that_the_server_cut_off_is_asked_for_again_and_then_a_failure():
    """However whole it looks: what a judge thought first may stand there, and be taken back."""
    with serving(lambda answer, attempt: "cut off" if attempt == 1 else None) as server:
        assert judge_of(server).score_all(*ROWS) == TRUE
        assert server.faults["cut off"] == NUM_ROWS
    with serving(lambda answer, attempt: "cut off") as server:
        verdicts = judge_of(server, max_attempts=2).score_all(*ROWS)
    assert all("max_tokens" in verdict.error for verdict in verdicts)


def test_as_many_requests_at_once_as_allowed_and_never_more():
    """The server holds every request until four are there: fewer, or one by one, would fail."""
    barrier, workers = threading.Barrier(4), set()

    def hold():
        barrier.wait(timeout=60)
        names = [thread.name for thread in threading.enumerate()]
        workers.add(sum(name.startswith("judge") for name in names))

    with serving(before=hold) as server:
        rows = [column[:24] for column in ROWS]
        assert judge_of(server, concurrency=4, timeout_s=120.0).score_all(*rows) == TRUE[:24]
        assert server.most_at_once == 4
        assert workers == {4}, "a fifth worker could ask a fifth question"
    with serving(three_in_ten) as server:
        judge_of(server, concurrency=3).score_all(*ROWS)
        assert server.most_at_once <= 3


def test_equal_answers_are_asked_once_and_order_is_kept():
    with serving() as server:
        rows = [[*column[:3], *column[1::-1]] for column in ROWS]
        verdicts = judge_of(server).score_all(*rows)
        assert verdicts == [TRUE[place] for place in (0, 1, 2, 1, 0)]
        assert len(server.requests) == 3
        # Neither is a word to judge.
        silent = judge_of(server).score_all(["p"] * 2, ["", "<think>Hm, let me see"], [None] * 2)
        assert silent == [Verdict(1, coherent=False)] * 2
        assert len(server.requests) == 3


def test_the_key_turns_up_nowhere(tmp_path, caplog, capfd):
    """The server quotes the key in every error, and the log is at its most talkative."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    with serving(three_in_ten) as server:
        judge = judge_of(server, max_attempts=1, cache=tmp_path / "verdicts.sqlite")
        verdicts = judge.score_all(*ROWS)
    assert any("***" in (verdict.error or "") for verdict in verdicts)
    (tmp_path / "judge.pickle").write_bytes(pickle.dumps(judge))
    shown = [repr(judge), str(as_settings(judge)), repr(verdicts), caplog.text, *capfd.readouterr()]
    shown += [str(vars(record)) for record in caplog.records]
    assert not [text for text in shown if KEY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    libraries = {record.name.partition(".")[0] for record in caplog.records}
    assert libraries == {"patcher_pl"}, "HTTP libraries log addresses, some log bodies"
    assert "petals" not in caplog.text
    assert pickle.loads((tmp_path / "judge.pickle").read_bytes()) == judge


def test_a_second_run_asks_only_what_failed(tmp_path, monkeypatch):
    with serving(three_in_ten) as server:
        judge = judge_of(server, max_attempts=2, cache=tmp_path / "deep" / "verdicts.sqlite")
        first = judge.score_all(*ROWS)
        failed = sum(verdict.error is not None for verdict in first)
        assert failed
        server.requests.clear()
        server.plan = lambda answer, attempt: None
        assert judge.score_all(*ROWS) == TRUE
        assert len(server.requests) == failed, "failures must not be cached, verdicts must"
        # Now everything is known: no key, no server.
        monkeypatch.delenv("POTION_KEY")
        server.requests.clear()
        assert judge.score_all(*ROWS) == TRUE
        assert not server.requests


@pytest.mark.parametrize(
    "change",
    [
        {"model": "judge-2"},
        {"temperature": 0.5},
        {"temperature": None},
        {"max_tokens": 99},
        {"max_tokens_name": "max_completion_tokens"},
        {"json_mode": False},
        {"rubric": "5 is good, 1 is bad."},
        {"base_url": "localhost"},
    ],
)
def test_other_settings_are_other_cache_entries(change, tmp_path):
    """Wrong if a verdict of one judge were taken for that of another."""
    rows = [column[:2] for column in ROWS]
    with serving() as server:
        judge = judge_of(server, cache=tmp_path / "verdicts.sqlite")
        judge.score_all(*rows)
        if "rubric" in change:
            (tmp_path / "rubric.txt").write_text(change["rubric"])
            change = {"rubric": tmp_path / "rubric.txt"}
        if "base_url" in change:
            change = {"base_url": server.url.replace("127.0.0.1", change["base_url"])}
        other = replace(judge, **change)
        other.score_all(*rows)
        assert len(server.requests) == 4
        replace(judge, concurrency=1, timeout_s=9.0, max_attempts=3).score_all(*rows)
        assert len(server.requests) == 4, "how a verdict was fetched does not change it"
        assert server.requests[0]["response_format"]["type"] == "json_schema"
        assert server.requests[0]["temperature"] == 0
        sent = server.requests[-1]
        for name in set(change) - {"rubric", "base_url", "json_mode", "max_tokens_name"}:
            assert sent.get(name) == change[name]


@pytest.mark.long
def test_processes_share_a_cache(tmp_path):
    """Wrong if a second process lost verdicts, or stumbled over a file that is being written."""
    with serving(three_in_ten) as server:
        judge = judge_of(server, max_attempts=12, cache=tmp_path / "verdicts.sqlite")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            runs = [pool.submit(judge.score_all, *ROWS) for _ in range(2)]
            assert [run.result() for run in runs] == [TRUE, TRUE]
        server.requests.clear()
        assert judge.score_all(*ROWS) == TRUE
        assert not server.requests


def test_a_cache_that_cannot_be_written_costs_no_verdict(tmp_path, caplog):
    path = tmp_path / "verdicts.sqlite"
    rows = [column[:5] for column in ROWS]
    with serving() as server:
        judge = judge_of(server, cache=path)
        judge.score_all(*[column[:1] for column in rows])
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TRIGGER full BEFORE INSERT ON verdicts "
                "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
            )
        connection.close()
        assert judge.score_all(*rows) == TRUE[:5]
    assert caplog.text.count("disk full") == 1


def form_of(request):
    return request.get("response_format", {}).get("type")


@pytest.mark.parametrize(
    ("refused", "form"),
    [
        ((), "json_schema"),
        (("json_schema",), "json_object"),
        (("json_schema", "json_object"), None),
        (("json_object",), "json_schema"),
    ],
)
def test_a_server_is_asked_for_the_strictest_form_that_it_takes(refused, form):
    """Wrong if verdicts were lost on servers without structured outputs, or others not used."""
    with serving() as server:
        server.refused_forms = refused
        assert judge_of(server, max_attempts=1).score_all(*ROWS) == TRUE
        assert form_of(server.requests[-1]) == form
        server.requests.clear()
        assert judge_of(server, max_attempts=1).score_all(*ROWS) == TRUE
        assert {form_of(request) for request in server.requests} == {form}, "it is remembered"
        server.requests.clear()
        assert judge_of(server, json_mode=False).score_all(*ROWS) == TRUE
        assert {form_of(request) for request in server.requests} == {None}


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refused_key_or_unknown_model_stops_the_run(status):
    """Wrong if thousands of requests followed that must fail too, or the error told no remedy."""
    with serving(lambda answer, attempt: status) as server:
        with pytest.raises(ConfigError) as caught:
            judge_of(server, concurrency=2).score_all(*ROWS)
        assert len(server.requests) <= 2
        message = str(caught.value)
        assert all(text in message for text in (server.url, "judge-1", "POTION_KEY", status))
        assert KEY not in message
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_wrong_address_stops_the_run():
    with serving() as server:
        wrong = server.url.replace("/v1", "/v2")
        with pytest.raises(ConfigError, match=r"404.*/v2.*most end in /v1"):
            judge_of(server, base_url=wrong).score("p", "Stir.", None)


def test_a_request_that_the_server_refuses_is_not_repeated():
    with serving(lambda answer, attempt: "400") as server:
        verdict = judge_of(server).score("p", "Stir.", None)
        assert verdict.error == "HTTP 400: you sent Bearer ***"
        # It does not say of what: every form is tried once.
        forms = [form_of(request) for request in server.requests]
        assert forms == ["json_schema", "json_object", None]
        server.requests.clear()
        server.plan = lambda answer, attempt: "400" if answer == "Sing." else None
        verdicts = judge_of(server, concurrency=1).score_all(
            ["p"] * 2, ["Stir.", "Sing."], [None] * 2
        )
        assert [verdict.error is None for verdict in verdicts] == [True, False]
        forms = [form_of(request) for request in server.requests]
        assert forms == ["json_schema"] * 2, "of a form that it took it cannot be"


def test_nobody_at_home_is_an_error_not_a_crash():
    with serving() as server:
        judge = judge_of(server, max_attempts=2)
    verdict = judge.score("p", "Stir.", None)
    assert verdict.score is None
    assert "no connection" in verdict.error


def test_a_server_without_keys_needs_none(monkeypatch):
    monkeypatch.delenv("POTION_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        judge = judge_of(server, api_key_env=None)
        assert judge.score(*[column[0] for column in ROWS]) == TRUE[0]
        assert server.keys == {"Bearer none"}, "a key meant for others must not be sent"


def test_text_that_no_server_takes_is_mended():
    """Half a surrogate pair, as JSON files can hold it, cannot be sent as UTF-8."""
    with serving() as server:
        verdict = judge_of(server).score("How? \ud83d", "Stir \ud83d.", None)
        assert verdict.error is None
        assert len(server.requests) == 1
