"""The folder that `init` writes: data, two configurations, and a page with the commands."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher_pl.errors import ConfigError
from patcher_pl.files import write_text
from patcher_pl.starter.model import LARGE, TINY, ModelFacts
from patcher_pl.starter.split import Split
from patcher_pl.types import Conversation

_TEMPLATES = ("fit.yaml", "attack.yaml", "README.md")
_PARTS = ("safe", "unsafe", "attack", "prompts", "benign_prompts")
_ROLES = ["user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Starter:
    """What goes into the folder.

    Args:
        model: What the user gave: directory, hub id or `testbed`.
        facts: What is known of it.
        split: The rows.
        safe: Where the rows came from, for the page.
        unsafe: Likewise.
        max_length: Longest conversation (tokens).
        max_new_tokens: Longest answer of a measurement (tokens).
        control: Whether `fit` trains an SFT control too.
        seed: Of the split and of training.
    """

    model: str
    facts: ModelFacts
    split: Split
    safe: str
    unsafe: str
    max_length: int
    max_new_tokens: int
    control: bool
    seed: int


def files_of(folder: Path) -> list[Path]:
    """What `write_starter` writes."""
    return [
        *(folder / name for name in _TEMPLATES),
        *(folder / "data" / f"{part}.jsonl" for part in _PARTS),
    ]


def require_free(folder: Path, overwrite: bool) -> None:
    """Sees to it that nothing is overwritten unasked.

    Raises:
        ConfigError: If a file is there already.
    """
    taken = [str(file) for file in files_of(folder) if file.exists()]
    if taken and not overwrite:
        raise ConfigError(
            f"{folder} holds {', '.join(taken)} already. Give another folder, or --overwrite true, which "
            "replaces these files and nothing else."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Give a folder.")


def write_starter(folder: Path, starter: Starter) -> None:
    """Writes data first, the page last: a folder with a page is whole."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    readers = dict[str, str]()
    for part in _PARTS:
        rows: Sequence[Conversation] = getattr(starter.split, part)
        has_turns = any(not _is_plain(row) for row in rows)
        readers[part] = ", reader: {class_path: patcher_pl.data.Messages}" if has_turns else ""
        lines = [json.dumps(_as_row(row, has_turns), ensure_ascii=False) for row in rows]
        write_text(folder / "data" / f"{part}.jsonl", "".join(f"{line}\n" for line in lines))

    def source(part: str, harmful: bool) -> str:
        mark = ", harmful: true" if harmful else ""
        return f"{{path: ./data/{part}.jsonl{mark}{readers[part]}}}"

    environment = Environment(
        loader=PackageLoader("patcher_pl.starter", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values: Mapping[str, Any] = {
        **vars(starter),
        "model_name": starter.model,
        "model_path": model_path(starter.model, folder),
        "source": source,
        "tiny": TINY,
        "large": LARGE,
    }
    for name in (*_TEMPLATES,):
        write_text(folder / name, environment.get_template(f"{name}.j2").render(values))


def model_path(model: str, folder: Path) -> str:
    """How a configuration in `folder` names a model so that it is found from anywhere."""
    directory = Path(model).expanduser()
    if model == "testbed" or not directory.is_dir():
        return model
    place, root = directory.resolve(), folder.resolve()
    return f"./{place.relative_to(root)}" if place.is_relative_to(root) else str(place)


def _is_plain(row: Conversation) -> bool:
    return [turn.role for turn in row.messages] == _ROLES


def _as_row(row: Conversation, has_turns: bool) -> dict[str, Any]:
    if has_turns:
        return {"messages": [vars(turn) for turn in row.messages]}
    prompt, response = row.messages
    return {"prompt": prompt.content, "response": response.content}
