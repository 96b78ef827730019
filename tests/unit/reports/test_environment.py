"""What a result file says about its run, and what it must never say."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from patcher_pl.reports import environment
from patcher_pl.reports.environment import without_secrets
from patcher_pl.reports.settings import as_settings, fingerprint


def test_it_is_plain_json_and_names_versions():
    content = json.loads(json.dumps(environment(["patcher-pl", "fit"])))
    assert content["command"] == ["patcher-pl", "fit"]
    assert content["packages"]["torch"].startswith("2.")
    assert content["cpu_count"] >= 1
    assert "git_commit" in content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hub.token=abc"], ["--hub.token=***"]),
        (["--hub_token", "abc", "--k1", "40"], ["--hub_token", "***", "--k1", "40"]),
        (["--password", "--k1", "40"], ["--password", "--k1", "40"]),
        (["OPENAI_API_KEY=abc"], ["OPENAI_API_KEY=***"]),
        (["x", "hf_abcdefghijklmnop"], ["x", "***"]),
        (["--data=s3://me:word@host/x"], ["--data=s3://***@host/x"]),
        (["--generation.max_new_tokens=64"], ["--generation.max_new_tokens=64"]),
        (["--max_new_tokens", "64"], ["--max_new_tokens", "64"]),
        (["--config", "configs/testbed/sft.yaml"], ["--config", "configs/testbed/sft.yaml"]),
    ],
)
def test_secrets_are_not_written_down(arguments, expected):
    assert without_secrets(arguments) == expected


@dataclass(frozen=True)
class Recipe:
    name: str
    minutes: float
    parts: tuple
    book: Path | None = None


class Cook:
    def __init__(self, hat):
        self.hat = hat


def test_settings_read_like_a_config():
    recipe = Recipe("cake", 2.5, ("egg", Cook("white")), Path("a/b"))
    assert as_settings({"dish": recipe}) == {
        "dish": {
            "class_path": f"{__name__}.Recipe",
            "init_args": {
                "name": "cake",
                "minutes": 2.5,
                "parts": [
                    "egg",
                    {"class_path": f"{__name__}.Cook", "init_args": {"hat": "white"}},
                ],
                "book": "a/b",
            },
        }
    }


def test_fingerprints_follow_the_settings_not_the_objects():
    """Wrong if a run could not be resumed, or were resumed with other settings."""
    assert fingerprint(Cook("white")) == fingerprint(Cook("white"))
    assert fingerprint(Cook("white")) != fingerprint(Cook("tall"))
    assert fingerprint(Recipe("tea", 3, ())) != fingerprint(Recipe("tea", 3, ("leaf",)))
    with pytest.raises(TypeError):
        fingerprint(object())
