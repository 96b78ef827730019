"""What files, models and data sets hold, as digests: neither names nor times of change count.

A model or data set on the hub counts by its commit, which is a digest of all its files.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Literal

# What transformers and PEFT read of a model: weights, configurations, tokenizer, chat template, code.
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*config*.json", "*.py"),
    *("*token*.json", "vocab*", "merges*", "chat_template*", "*.jinja", "*.model", "*.tiktoken"),
)
_ADAPTERS = "adapter_config.json"
_TIMEOUT_S = 10.0


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read once per process unless its size or time of change differ.

    Raises:
        OSError: If it cannot be read.
    """
    stat = path.stat()
    return _read(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


def model_digest(location: str, revision: str | None = None) -> str | None:
    """Digest of a local model, or commit of one on the hub; None where neither is known.

    Of a directory with adapters, the model that they belong to counts as well.

    Args:
        location: Directory, file, or hub id.
        revision: Branch, tag or commit on the hub.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return _hub_commit(location, revision, "model")
    found = [
        file
        for file in (*path.iterdir(), *path.glob("additional_chat_templates/*"))
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _OF_A_MODEL)
    ]
    digest = _digest_of(path, found)
    base = _base_model(path / _ADAPTERS)
    # Adapters may name the directory that they lie in.
    if base is None or Path(base).expanduser().resolve() == path.resolve():
        return digest
    return _digest([digest, model_digest(base) or base])


def data_digest(location: str, revision: str | None = None) -> str | None:
    """Digest of a local file or directory, or commit of a data set on the hub; None if unknown.

    Args:
        location: File, directory, or hub id.
        revision: Branch, tag or commit on the hub.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return _hub_commit(location, revision, "dataset")
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return _digest_of(path, [file for file in files if not _is_hidden(file.relative_to(path))])


def _digest_of(root: Path, files: Sequence[Path]) -> str:
    with ThreadPoolExecutor() as pool:  # Hashing large files releases the interpreter.
        digests = list(pool.map(file_digest, files))
    names = [file.relative_to(root).as_posix() for file in files]
    return _digest(sorted(zip(names, digests, strict=True)))


@cache
def _read(path: Path, size: int, time_ns: int, inode: int) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _base_model(adapters: Path) -> str | None:
    try:
        base = json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # No adapters, or such as loading them will complain about.
    if not isinstance(base, str):
        return None
    beside = adapters.parent / base  # Where loading looks, too, if the name leads nowhere else.
    return str(beside) if beside.is_dir() and not Path(base).is_dir() else base


@cache
def _hub_commit(
    repository: str, revision: str | None, kind: Literal["model", "dataset"]
) -> str | None:
    """The commit that loading would take now: the hub's newest, or the one that was fetched."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        known = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=_TIMEOUT_S)
    except HFValidationError:
        return None
    except Exception:  # Offline, mostly; which errors those are is for the hub's HTTP library.
        folder = repo_folder_name(repo_id=repository, repo_type=kind)
        fetched, branch = Path(constants.HF_HUB_CACHE) / folder, revision or "main"
        if (fetched / "snapshots" / branch).is_dir():
            return branch
        reference = fetched / "refs" / branch
        return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
    return known.sha
