"""A tiny model and a PEFT adapter of it."""

from pathlib import Path
from typing import Any

import torch

from patcher_pl.models import LanguageModel
from tests.commands import write_inputs


def base_and_adapter(
    folder: Path, config: Any = None, *, tokenizer: bool = True
) -> tuple[Path, Path]:
    """Writes a tiny model, and an adapter of it that changes its answers."""
    from peft import LoraConfig, get_peft_model

    inputs = write_inputs(folder)
    base = LanguageModel(path=str(inputs / "model"))
    torch.manual_seed(0)
    config = config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(base.load_model(), config)
    adapted.save_pretrained(folder / "adapter")
    if tokenizer:
        base.load_tokenizer().save_pretrained(folder / "adapter")
    return inputs / "model", folder / "adapter"
