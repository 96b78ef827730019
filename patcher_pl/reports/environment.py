"""What a run ran on: enough to repeat it, nothing that identifies or unlocks anything."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = [
    "patcher-pl",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "peft",
    "torchmetrics",
    "jsonargparse",
    "safetensors",
]
_SECRET_NAME = re.compile(r"token|secret|passw|api[-_.]?key|credential|auth", re.IGNORECASE)
# Settings have names of their own, such as `tokenizer`: only a whole word at the end is a secret.
_SECRET_KEY = re.compile(
    r"(?:^|[-_.])(?:token|secret|password|api_?key|credentials?)$", re.IGNORECASE
)
# Names such as max_new_tokens hold counts; a secret is never a plain number.
_NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{8,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_HIDDEN = "***"


def environment(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, platform, processors, source commit and command line, as plain JSON values.

    Args:
        arguments: The command line; None takes that of this process. Values that look like secrets
            are replaced by `***`.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": usable_cpus(),
        "accelerator": _accelerator(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": git_commit(),
        "command": without_secrets(sys.argv if arguments is None else arguments),
    }


def usable_cpus() -> int:
    """Processors that this process may use (count)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` with changes; None elsewhere.

    An installed package has none, even where it is installed inside somebody's checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*describe, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with values that look like secrets replaced by `***`."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("-")
        if hide_next and not is_option:
            shown.append(argument if _NUMBER.fullmatch(argument) else _HIDDEN)
        elif equals and _SECRET_NAME.search(name) and not _NUMBER.fullmatch(value):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_URL_LOGIN.sub(f"{_HIDDEN}@", _SECRET_VALUE.sub(_HIDDEN, argument)))
        hide_next = is_option and not equals and bool(_SECRET_NAME.search(name))
    return shown


def hide_secrets(content: Any) -> Any:
    """Returns settings (mappings, lists, values) with those that look like secrets as `***`."""
    if isinstance(content, Mapping):
        return {
            name: _HIDDEN
            if isinstance(value, str) and _SECRET_KEY.search(str(name))
            else hide_secrets(value)
            for name, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [hide_secrets(entry) for entry in content]
    if isinstance(content, str):
        return _URL_LOGIN.sub(f"{_HIDDEN}@", _SECRET_VALUE.sub(_HIDDEN, content))
    return content


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    # Only asks a torch that the run has loaded anyway: reports must not load it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return None
