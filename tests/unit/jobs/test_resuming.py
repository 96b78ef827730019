"""Differences between the settings of two runs, and what they mean."""

import pytest

from patcher_pl.jobs.resuming import changes, flat_settings

CONFIG = {
    "run_dir": "run",
    "ckpt_path": None,
    "model": {
        "class_path": "Patcher",
        "init_args": {
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}},
            "scheduler": None,
            "attacker": {"num_steps": 4},
            "api_key": "geheim",
        },
    },
    "data": {"safe": {"sources": [{"path": "safe.jsonl", "limit": None}]}},
    "trainer": {"callbacks": []},
}


def with_value(config, name, value):
    key, _, rest = name.partition(".")
    if isinstance(config, list):
        place = int(key)
        parts = [*config, {}] if place == len(config) else list(config)
        parts[place] = with_value(parts[place], rest, value) if rest else value
        return parts
    inner = config.get(key)
    return {**config, key: with_value(inner, rest, value) if rest else value}


@pytest.mark.parametrize(
    ("name", "value", "expected", "refused"),
    [
        ("run_dir", "elsewhere", [], False),
        ("model.init_args.attacker.num_steps", 8, ["4 -> 8"], False),
        ("model.init_args.optimizer.init_args.betas", [0.9, 0.8], ["betas.1: 0.99 -> 0.8"], False),
        ("model.init_args.optimizer.class_path", "SGD", ["AdamW -> SGD"], True),
        ("model.init_args.scheduler", {"class_path": "X"}, ["None -> (several settings)"], True),
        ("model.init_args.api_key", "sesam", ["*** -> ***, with other content"], False),
        ("data.safe.sources.0.limit", 3, ["None -> 3"], True),
        ("data.safe.sources.1.path", "b.jsonl", ["1.path: (none) -> b.jsonl"], True),
        # As a later version may bring along.
        ("model.init_args.optimizer.init_args.novel", False, ["(none) -> False"], False),
        ("trainer.callbacks", [{"class_path": "A"}], ["[] -> (several settings)"], False),
    ],
)
def test_every_difference_is_told_once_and_has_a_meaning(
    tmp_path, monkeypatch, name, value, expected, refused
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safe.jsonl").write_text("{}")
    before = flat_settings(CONFIG, with_contents=True)
    now = flat_settings(with_value(CONFIG, name, value), with_contents=True)
    found = changes(before, now)
    assert len(found) == len(expected)
    for change, text in zip(found, expected, strict=True):
        assert str(change).endswith(text)
    assert all((change.refused is not None) == refused for change in found)
    assert changes(now, now) == []


def test_names_do_not_count_but_contents_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("safe.jsonl", "moved.jsonl"):
        (tmp_path / name).write_text("{}")
    before = flat_settings(CONFIG, with_contents=True)
    moved = with_value(CONFIG, "data.safe.sources.0.path", "moved.jsonl")
    assert changes(before, flat_settings(moved, with_contents=True)) == []
    (tmp_path / "safe.jsonl").write_text("{ }")
    (change,) = changes(before, flat_settings(CONFIG, with_contents=True))
    assert str(change).endswith("safe.jsonl -> safe.jsonl, with other content")
    assert change.refused


def test_a_schedule_holds_the_settings_that_it_began_with():
    config = with_value(CONFIG, "model.init_args.scheduler", {"class_path": "X"})
    changed = with_value(config, "model.init_args.optimizer.init_args.lr", 0.1)
    before, now = (flat_settings(one, with_contents=False) for one in (config, changed))
    (change,) = changes(before, now)
    assert change.refused is not None and "schedule" in change.refused
