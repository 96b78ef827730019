"""Small attacks on small models, and how far two vectors are apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.attackers import InnerProblem
from patcher_pl.losses import differentiable_loss
from patcher_pl.optim import SGD, AdamW, ClipByGlobalNorm, Optimizer, Update

CLIP = 0.5
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.03, momentum=0.9, weight_decay=0.1),
    "adamw": AdamW(lr=2e-3, weight_decay=0.1).differentiable(),
    "adamw-without-eps_root": AdamW(lr=2e-3, weight_decay=0.1, eps_root=0.0),
}


def make_llama(dtype: torch.dtype = torch.float64, **options: Any) -> LlamaForCausalLM:
    """Two layers with grouped keys, default attention, and a parameter without any gradient."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.unused = nn.Parameter(torch.ones(3))
    return model.to(dtype).eval()


def batch(seed: int, vocabulary: int = 30) -> Any:
    """Two rows, one padded. The padding token occurs in the text too; ids from 30 on never do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def attack(
    optimizer: Optimizer, num_steps: int, clip: float | None = CLIP, **options: Any
) -> InnerProblem:
    update = Update(
        optimizer=optimizer,
        num_steps=num_steps,
        clip=None if clip is None else ClipByGlobalNorm(max_norm=clip),
        schedule="cosine",
    )
    return InnerProblem(batches=[batch(n) for n in range(num_steps)], update=update, **options)


def outer_loss(model: nn.Module) -> Tensor:
    return differentiable_loss(model, batch(99))


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||found - expected|| / ||expected|| over all tensors together."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    square = sum(float((b * b).sum()) for _, b in pairs)
    return (sum(float(((a - b) ** 2).sum()) for a, b in pairs) / square) ** 0.5


class Quadratic(nn.Module):
    """L = 1/2 (w - c)' A (w - c) with the target c given by the batch."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.A = root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def inner_loss(self, batch: Any) -> Tensor:
        difference = self.w - batch["target"]
        return 0.5 * difference @ self.A @ difference


def quadratic_attack(model: Quadratic, optimizer: Optimizer, num_steps: int) -> InnerProblem:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(num_steps, len(model.w), generator=generator, dtype=torch.float64)
    batches: Any = [{"target": target} for target in targets]
    return InnerProblem(
        batches=batches,
        update=Update(optimizer=optimizer, num_steps=num_steps),
        loss_function=lambda module, one: module.inner_loss(one),  # type: ignore[operator]
    )


def distance_to_origin(model: nn.Module) -> Tensor:
    return 0.5 * (model.w * model.w).sum()  # type: ignore[operator]
