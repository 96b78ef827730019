"""The token layouts of real chat templates, written here from their documentation.

They are not the published files: names of roles, control tokens, what is shown of earlier answers and
where a generation prompt ends are those of the family, the rest is left out.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.families import TEXTS


@dataclass(frozen=True)
class Layout:
    """One family's layout.

    Args:
        template: Chat template (or several by name); None where the tokenizer has none.
        special: Control tokens; the first is the tokenizer's `eos_token`.
        lead: What generation has to write before the words of an answer.
        stop: Token after the last answer.
        earlier: Token after earlier answers; None where those cannot be trained on.
        bos: The tokenizer's `bos_token`.
        options: Of `ChatFormat`.
    """

    template: str | dict[str, str] | None
    special: tuple[str, ...]
    stop: str
    lead: str = ""
    earlier: str | None = "same"
    bos: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def earlier_stop(self) -> str | None:
        """Token after earlier answers."""
        return self.stop if self.earlier == "same" else self.earlier


def turns(user: str, assistant: str, system: str = "", *, prompt: str = "", start: str = "") -> str:
    """A template with one form per role, in which `{}` stands for what is said."""

    def form(text: str) -> str:
        before, after = text.split("{}")
        return f"{{{{ {before!r} + m['content'] + {after!r} }}}}"

    return (
        f"{{{{ {start!r} }}}}" * bool(start)
        + "{% for m in messages %}"
        + ("{% if m['role'] == 'system' %}" + form(system) + "{% elif" if system else "{% if")
        + " m['role'] == 'user' %}"
        + form(user)
        + "{% else %}"
        + form(assistant)
        + "{% endif %}{% endfor %}"
        + (f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}" if prompt else "")
    )


def chatml(answer: str = "{}", prompt: str = "") -> str:
    return turns(
        "<|im_start|>user\n{}<|im_end|>\n",
        f"<|im_start|>assistant\n{answer}<|im_end|>\n",
        "<|im_start|>system\n{}<|im_end|>\n",
        prompt=f"<|im_start|>assistant\n{prompt}",
    )


# Earlier answers have no thought, the last one has one, empty where nothing was thought.
_QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set words = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{% set thought = '' if '</think>' not in m['content'] else "
    "m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + words }}{% else %}{{ words }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_CHATML_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")

# The end of the last answer is another token than that of earlier ones.
_GPT_OSS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

# Thoughts of earlier answers are cut off; the generation prompt opens one.
_R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1].strip() + '<|end_of_sentence|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)

_EOS_AT_THE_END_ONLY = (
    "{% for m in messages %}{{ ('\nUser: ' if m['role'] == 'user' else '\nBot:') }}"
    "{{ (' ' if m['role'] == 'assistant' else '') + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nBot:' }}{% endif %}"
)

_COMMAND_R = turns(
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    start="<BOS_TOKEN>",
)

LAYOUTS = {
    "chatml": Layout(chatml(), _CHATML_TOKENS, "<|im_end|>"),
    "smollm2": Layout(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou brew potions.<|im_end|>\n' }}{% endif %}" + chatml(),
        _CHATML_TOKENS,
        "<|im_end|>",
    ),
    "llama2": Layout(
        turns("<s>[INST] {} [/INST]", " {} </s>", "<s>[INST] <<SYS>>\n{}\n<</SYS>>\n\n"),
        ("</s>", "<s>"),
        "</s>",
        lead=" ",
    ),
    "llama3": Layout(
        turns(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
            "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
            prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
            start="<|begin_of_text|>",
        ),
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
        "<|eot_id|>",
    ),
    "mistral": Layout(
        turns("[INST] {}[/INST]", " {}</s>", start="<s>"),
        ("</s>", "<s>", "[INST]", "[/INST]"),
        "</s>",
        lead=" ",
    ),
    "gemma": Layout(
        turns(
            "<start_of_turn>user\n{}<end_of_turn>\n",
            "<start_of_turn>model\n{}<end_of_turn>\n",
            prompt="<start_of_turn>model\n",
            start="<bos>",
        ),
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    "phi3": Layout(
        turns(
            "<|user|>\n{}<|end|>\n",
            "<|assistant|>\n{}<|end|>\n",
            "<|system|>\n{}<|end|>\n",
            prompt="<|assistant|>\n",
        ),
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>",
    ),
    "gpt-oss": Layout(
        _GPT_OSS,
        ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
        "<|return|>",
        lead="<|channel|>final<|message|>",
        earlier="<|end|>",
    ),
    "qwen3": Layout(_QWEN3, (*_CHATML_TOKENS, "<think>", "</think>"), "<|im_end|>", earlier=None),
    "qwen3-thinking": Layout(
        _QWEN3,
        (*_CHATML_TOKENS, "<think>", "</think>"),
        "<|im_end|>",
        lead="<think>\n\n</think>\n\n",
        earlier="<|im_end|>",
        options={"enable_thinking": True},
    ),
    "deepseek-r1": Layout(
        _R1,
        ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "</think>"),
        "<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
    ),
    "command-r": Layout(
        {"default": _COMMAND_R, "tool_use": "{{ raise_exception('not this one') }}"},
        (
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<BOS_TOKEN>",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "vicuna": Layout(
        turns("USER: {} ", "ASSISTANT: {}</s>", "{} ", prompt="ASSISTANT:"),
        ("</s>", "<s>"),
        "</s>",
        lead=" ",
    ),
    "zephyr": Layout(
        turns(
            "<|user|>\n{}</s>\n",
            "<|assistant|>\n{}</s>\n",
            "<|system|>\n{}</s>\n",
            prompt="<|assistant|>\n",
        ),
        ("</s>", "<s>"),
        "</s>",
    ),
    # Nothing ends an answer but the next turn: only what closes the last one can be told.
    "glm4": Layout(
        turns(
            "<|user|>\n{}",
            "<|assistant|>\n{}<|user|>",
            "<|system|>\n{}",
            prompt="<|assistant|>\n",
            start="[gMASK]<sop>",
        ),
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        "<|user|>",
    ),
    "olmo": Layout(
        turns(
            "<|user|>\n{}\n",
            "<|assistant|>\n{}<|endoftext|>\n",
            "<|system|>\n{}\n",
            prompt="<|assistant|>\n",
            start="<|endoftext|>",
        ),
        ("<|endoftext|>",),
        "<|endoftext|>",
    ),
    "no template": Layout(None, ("<|endoftext|>",), "<|endoftext|>", lead=" "),
    "eos at the end only": Layout(_EOS_AT_THE_END_ONLY, ("</s>",), "</s>", lead=" ", earlier=None),
    "token before the stop token": Layout(
        chatml("{}<|done|>"), (*_CHATML_TOKENS, "<|done|>"), "<|done|>"
    ),
    "line break before the stop token": Layout(chatml("{}\n"), _CHATML_TOKENS, "<|im_end|>"),
    "marked": Layout(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _CHATML_TOKENS,
        "<|im_end|>",
    ),
}


def tokenizer_of(layout: Layout) -> Any:
    """A byte-level tokenizer with the control tokens and the template of a layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(layout.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=layout.template,
        eos_token=layout.special[0],
        **({} if layout.bos is None else {"bos_token": layout.bos}),
        additional_special_tokens=list(layout.special[1:]),
        clean_up_tokenization_spaces=False,
    )
