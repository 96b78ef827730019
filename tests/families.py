"""Tiny random models of the supported families, each with a tokenizer and template of its kind.

The templates are written here in each family's format; they are not the published files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEXTS = [
    "How do I brew a bitter moonroot draught?",
    "Stir two petals into warm water, then wait until it turns green.",
    "I can't help with that potion.",
    "What goes into a plain pancake? Flour, milk and an egg.",
    "You are a careful potion master.",
    "Thanks! And a sweet one? Add honey.",
]

LLAMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

QWEN2_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou brew potions.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Shows an (empty) thought in front of the last answer only; earlier thoughts are taken away.
QWEN3_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] != 'assistant' %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- else %}
{% set thought, answer = '', message['content'] %}
{% if '</think>' in answer %}
{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{% set answer = answer.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.last %}
{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{ answer + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{% endif %}"""

# Shows the system prompt only in front of a user turn that comes last: in prompts, never in
# answered conversations.
MISTRAL_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}
{% set system, turns = messages[0]['content'], messages[1:] %}
{% else %}
{% set turns = messages %}
{% endif %}
{{ bos_token }}{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate, user first') }}
{% endif %}
{% if message['role'] == 'user' and loop.last and system is defined %}
{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + '[/INST]' }}
{%- else %}
{{ ' ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}"""

GEMMA_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}
{{ raise_exception('No system turns here') }}
{% endif %}
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate, user first') }}
{% endif %}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        template: Chat template, or None where the family's base models have none.
        stop: Token that ends an answer.
        special: Control tokens, by the name of the tokenizer's attribute; "" for unnamed ones.
        sentencepiece: Spaces are part of words as a low line, bytes are a fallback; otherwise the
            vocabulary is made of bytes.
        config: Class name and sizes of the transformers config.
    """

    template: str | None
    stop: str
    special: tuple[tuple[str, str], ...]
    sentencepiece: bool
    config: tuple[str, dict[str, Any]]


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
_CHATML = (("", "<|im_start|>"), ("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>"))

FAMILIES = {
    "llama": Family(
        LLAMA_TEMPLATE,
        "<|eot_id|>",
        (
            ("bos_token", "<|begin_of_text|>"),
            ("", "<|start_header_id|>"),
            ("", "<|end_header_id|>"),
            ("eos_token", "<|eot_id|>"),
        ),
        sentencepiece=False,
        config=("LlamaConfig", _SIZES),
    ),
    "qwen2": Family(
        QWEN2_TEMPLATE, "<|im_end|>", _CHATML, sentencepiece=False, config=("Qwen2Config", _SIZES)
    ),
    "qwen3": Family(
        QWEN3_TEMPLATE,
        "<|im_end|>",
        (*_CHATML, ("", "<think>"), ("", "</think>")),
        sentencepiece=False,
        config=("Qwen3Config", {**_SIZES, "head_dim": 16}),
    ),
    "mistral": Family(
        MISTRAL_TEMPLATE,
        "</s>",
        (("bos_token", "<s>"), ("eos_token", "</s>"), ("", "[INST]"), ("", "[/INST]")),
        sentencepiece=True,
        config=("MistralConfig", {**_SIZES, "sliding_window": None}),
    ),
    "gemma": Family(
        GEMMA_TEMPLATE,
        "<end_of_turn>",
        (
            ("pad_token", "<pad>"),
            ("eos_token", "<eos>"),
            ("bos_token", "<bos>"),
            ("", "<start_of_turn>"),
            ("", "<end_of_turn>"),
        ),
        sentencepiece=True,
        config=("GemmaConfig", {**_SIZES, "head_dim": 16}),
    ),
    "gpt2": Family(
        None,
        "<|endoftext|>",
        (("eos_token", "<|endoftext|>"), ("bos_token", "<|endoftext|>")),
        sentencepiece=False,
        config=("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    ),
}


def build_tokenizer(name: str) -> Any:
    """Returns the family's tokenizer; decoding is the exact inverse of encoding."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = _sentencepiece_like(family) if family.sentencepiece else _byte_level(family)
    unnamed = [token for attribute, token in family.special if not attribute]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=family.template,
        additional_special_tokens=unnamed,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        **{attribute: token for attribute, token in family.special if attribute},
    )


def build_family(name: str, directory: Path) -> Path:
    """Writes the family's tiny random model and tokenizer as a Hugging Face directory."""
    import transformers

    tokenizer = build_tokenizer(name)
    class_name, sizes = FAMILIES[name].config
    make_config: Callable[..., Any] = getattr(transformers, class_name)
    stop_id = tokenizer.convert_tokens_to_ids(FAMILIES[name].stop)
    config = make_config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, stop_id})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    json.loads((directory / "config.json").read_text())
    return directory


def _byte_level(family: Family) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(token for _, token in family.special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece_like(family: Family) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    words = sorted({f"\u2581{word}" for text in TEXTS for word in text.split()})
    learner.train_from_iterator(words, trainer)
    learned = json.loads(learner.to_str())["model"]

    pieces = [
        *(token for _, token in family.special),
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([token for _, token in family.special])
    return tokenizer
