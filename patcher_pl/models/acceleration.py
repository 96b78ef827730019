"""Compiled models, and Liger's kernels."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from patcher_pl.errors import ConfigError
from patcher_pl.models.blocks import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The loss is this package's own: Liger's would have to see the labels.
_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def accelerated(model: "PreTrainedModel", *, compile_: bool, liger: bool) -> "PreTrainedModel":
    """Returns the model, changed in place; names in its state dict stay as they are.

    Args:
        model: Causal LM, adapters attached.
        compile_: Compile it with torch when it is first called, one block at a time.
        liger: Put Liger's kernels in the place of norms, rotations and MLPs.

    Raises:
        ConfigError: If there is no GPU for Liger, it is not installed, or it does not know the
            architecture.
    """
    if liger:
        _apply_liger(model)
    if compile_:
        # All blocks share the code of the first: compiling takes as long as for a model of one
        # block. Batches differ in length: static shapes would be compiled over and over again.
        for part in find_blocks(model) or [model]:
            part.compile(dynamic=True)
    return model


def _apply_liger(model: "PreTrainedModel") -> None:
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "LanguageModel.liger needs Liger's kernels, which are not installed: "
            "pip install 'patcher-pl[gpu]'. Or set it to false."
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "LanguageModel.liger: Liger's kernels run on GPUs, and torch finds none. "
            "Set it to false."
        )
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, dict(_LIGER))
