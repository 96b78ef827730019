"""Builds the testbed: data files, tokenizer and a base model trained from scratch."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher_pl.files import write_atomically, write_text
from patcher_pl.testbed.tokenizer import CHAT_TEMPLATE, build_tokenizer
from patcher_pl.testbed.world import Row, files
from patcher_pl.threads import cpu_threads

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Everything that decides what comes out; part of the name under which the result is cached.
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TRAINING = {"lr": 3e-3, "num_steps": 900, "num_warmup_steps": 90, "batch_size": 64, "seed": 0}


def fingerprint() -> str:
    """Changes whenever the data, the tokenizer or the base model would come out differently."""
    rows = {name: [asdict(row) for row in content] for name, content in files().items()}
    recipe = json.dumps([rows, CHAT_TEMPLATE, MODEL, TRAINING], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def build_testbed(directory: Path) -> None:
    """Writes `model/` (an ordinary Hugging Face directory) and `data/*.jsonl` into `directory`.

    Uses one core. The directory appears whole or not at all.
    """

    def write(temporary: Path) -> None:
        content = files()
        for name, rows in content.items():
            write_text(temporary / "data" / f"{name}.jsonl", _json_lines(rows))
        words = [
            text for rows in content.values() for row in rows for text in (row.prompt, row.response)
        ]
        tokenizer = build_tokenizer(words)
        _train_base_model(tokenizer, content["base"]).save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")

    write_atomically(directory, write)


def _json_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)


def _train_base_model(tokenizer: "PreTrainedTokenizerFast", rows: list[Row]) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from patcher_pl.attackers import finetune
    from patcher_pl.data import BatchStream, ChatFormat, encode_all
    from patcher_pl.optim import AdamW
    from patcher_pl.types import Conversation, Message

    conversations = [
        Conversation(
            (Message("user", row.prompt), Message("assistant", row.response)), False, "base"
        )
        for row in rows
    ]
    stream = BatchStream(
        encode_all(tokenizer, ChatFormat(), conversations).examples,
        batch_size=TRAINING["batch_size"],
        pad_token_id=_token_id(tokenizer, "pad"),
        seed=TRAINING["seed"],
        group_by_length=True,
    )
    with torch.random.fork_rng(devices=[]), cpu_threads(1):
        torch.manual_seed(TRAINING["seed"])
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                pad_token_id=_token_id(tokenizer, "pad"),
                bos_token_id=_token_id(tokenizer, "bos"),
                eos_token_id=_token_id(tokenizer, "eos"),
                **MODEL,
            )
        )
        model.train()
        for _ in finetune(
            model,
            model.parameters(),
            stream.endless(),
            optimizer=AdamW(lr=TRAINING["lr"]),
            num_steps=TRAINING["num_steps"],
            max_grad_norm=1.0,
            schedule="cosine",
            num_warmup_steps=TRAINING["num_warmup_steps"],
        ):
            pass
    return model.eval()


def _token_id(tokenizer: Any, name: str) -> int:
    return int(getattr(tokenizer, f"{name}_token_id"))
