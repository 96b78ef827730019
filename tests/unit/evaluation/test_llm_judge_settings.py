"""Settings of the LLM judge, its key, its waiting and its cache file; no server is asked here."""

import sys
import threading

import pytest

from patcher_pl.errors import ConfigError
from patcher_pl.evaluation import LlmJudge, Verdict
from patcher_pl.evaluation.judges.cache import VerdictCache

ROW = (["How?"], ["Stir."], [None])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("concurrency", 0),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("max_attempts", 0),
        ("backoff_s", -1.0),
        ("max_wait_s", -1.0),
        ("max_tokens", 0),
        ("temperature", -0.1),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"LlmJudge\.{field} must be"):
        LlmJudge(**{"model": "m", field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_url", "https://me:hunter2@host/v1"),
        ("base_url", "https://host/v1?api_key=hunter2"),
        ("base_url", "host/v1"),
        ("base_url", "http://[hunter2"),
        ("api_key_env", "sk-hunter2"),
        ("api_key_env", ""),
    ],
)
def test_secrets_in_settings_are_refused_and_not_repeated(field, value):
    """Settings are written into results; an error ends up in logs."""
    with pytest.raises(ValueError, match=rf"LlmJudge\.{field} must be") as caught:
        LlmJudge(**{"model": "m", field: value})
    assert "hunter2" not in str(caught.value)


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.delenv("POTION_KEY", raising=False)
    judge = LlmJudge(model="m", api_key_env="POTION_KEY")
    with pytest.raises(ConfigError, match=r"POTION_KEY is not set.*`api_key_env: null`"):
        judge.score_all(*ROW)
    monkeypatch.setenv("POTION_KEY", "hunter2\nhunter2")
    with pytest.raises(ConfigError, match="POTION_KEY holds characters") as caught:
        judge.score_all(*ROW)
    assert "hunter2" not in str(caught.value)


def test_missing_libraries_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'patcher-pl\[judge\]'"):
        LlmJudge(model="m", api_key_env=None).score_all(*ROW)


def test_nothing_to_judge_asks_nobody(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert LlmJudge(model="m").score_all([], [], []) == []


def test_a_cache_keeps_verdicts_and_no_failures(tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    with VerdictCache(path) as cache:
        cache.put("a", Verdict(4, coherent=False))
        cache.put("b", Verdict(None, coherent=False, error="busy"))
        assert cache.get("c") is None
    with VerdictCache(path) as cache:
        assert cache.get("a") == Verdict(4, coherent=False)
        assert cache.get("b") is None


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Buy honey for the draught. " * 100)
    with pytest.raises(ConfigError, match=r"cache: .*notes\.txt cannot be used"):
        VerdictCache(path)
    assert path.read_text().startswith("Buy honey")
    with pytest.raises(ConfigError, match=r"cache: .* cannot be used"):
        VerdictCache(path / "below")


def test_writers_of_one_cache_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "verdicts.sqlite"

    def write(writer):
        with VerdictCache(path) as cache:
            for number in range(20):
                cache.put(f"{writer} {number}", Verdict(1 + number % 5, coherent=True))
                cache.put(f"shared {number}", Verdict(2, coherent=True))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with VerdictCache(path) as cache:
        for number in range(20):
            assert cache.get(f"shared {number}") == Verdict(2, coherent=True)
            for writer in range(4):
                assert cache.get(f"{writer} {number}") == Verdict(1 + number % 5, coherent=True)
