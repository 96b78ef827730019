"""Makes the files of the built-in testbed: data, tokenizer and a base model trained from scratch.

    python -m tools.build_testbed [--out FOLDER]      (default: the files that ship)

takes 45 seconds on one core. The data and the tokenizer come out the same everywhere; round-off of
another processor moves the weights, and with them the step at which a defense breaks, by a doubling
or so. So the model ships, and is made anew only when the world or this recipe changes.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patcher_pl.attackers import finetune
from patcher_pl.data import BatchStream, ChatFormat, encode_all
from patcher_pl.files import write_atomically
from patcher_pl.machine import cpu_threads
from patcher_pl.optim import AdamW
from patcher_pl.shipped import TESTBED
from patcher_pl.types import Conversation, Message
from patcher_pl.worlds.base import Row, write_rows
from patcher_pl.worlds.potions.world import files

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

# Roles are single tokens; {% generation %} marks what the assistant says, its end token included.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ROLES = ("<system>", "<user>", "<assistant>")


def build_testbed(directory: Path) -> None:
    """Writes `model/` (an ordinary Hugging Face directory) and `data/*.jsonl` into `directory`.

    The directory appears whole or not at all.
    """

    def write(temporary: Path) -> None:
        content = files()
        for name, rows in content.items():
            write_rows(temporary / "data" / f"{name}.jsonl", rows)
        words = [
            text for rows in content.values() for row in rows for text in (row.prompt, row.response)
        ]
        tokenizer = build_tokenizer(words)
        _train_base_model(tokenizer, content["base"]).save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        # safetensors makes a file that its owner alone may read.
        (temporary / "model" / "model.safetensors").chmod(0o644)

    write_atomically(directory, write)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each word of `texts`, its leading space included.

    Decoding is the exact inverse of encoding for any text made of known words.
    """
    split = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), behavior="isolated")
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    special = ["<pad>", "<unk>", "<bos>", "<eos>", *ROLES]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _train_base_model(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> LlamaForCausalLM:
    conversations = [
        Conversation(
            (Message("user", row.prompt), Message("assistant", row.response)), False, "base"
        )
        for row in rows
    ]
    stream = BatchStream(
        encode_all(tokenizer, ChatFormat(), conversations),
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the testbed's files.")
    parser.add_argument("--out", type=Path, default=TESTBED, help="folder; replaced if it exists")
    build_testbed(parser.parse_args().out)
