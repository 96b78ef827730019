"""Training steps of several variants in one process, one JSON line each.

A process of `python -m tools.gpu_check` runs this; it prints what it has after every variant.
"""

import gc
import json
import logging
import sys
import time
from dataclasses import fields
from typing import Any

import torch

from tools.throughput.sides import Setting
from tools.throughput.training import measure_side


def attention_difference(device: str) -> dict[str, Any]:
    """Packed attention in bfloat16 against `sdpa` in float32, by loss and gradient.

    The difference of `sdpa` in bfloat16 is that of the number format alone.
    """
    from patcher_pl.losses import causal_lm_loss
    from patcher_pl.types import move_batch

    found = {}
    for name, dtype, attn in (
        ("exact", "float32", None),
        ("sdpa_bfloat16", "bfloat16", None),
        ("packed_bfloat16", "bfloat16", "packed_sdpa"),
        ("packed_float32", "float32", "packed_sdpa"),
    ):
        setting = Setting(shape="miniature", device=device, dtype=dtype, our_attn=attn)
        model = setting.load_ours().train()
        batch = move_batch(setting.rows(1)[0], torch.device(device))
        loss = causal_lm_loss(model, batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])  # type: ignore[union-attr]
        found[name] = float(loss), gradient
    loss, gradient = found.pop("exact")
    return {
        name: {
            "loss": abs(one[0] - loss) / loss,
            "gradient": float((one[1] - gradient).norm() / gradient.norm()),
        }
        for name, one in found.items()
    }


def main() -> None:
    """Measures the variants of a job, given as JSON."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    job = json.loads(sys.argv[1])
    if job.get("attention"):
        print(json.dumps({"attention": attention_difference(job["device"])}), flush=True)
    for variant in job["variants"]:
        began = time.monotonic()
        shown = ("name", "part", "dtype", "autocast", "batch_size")
        named = {key: variant[key] for key in shown if key in variant}
        try:
            options = {field.name for field in fields(Setting)} & variant.keys()
            setting = Setting(
                shape=job["shape"],
                device=job["device"],
                **{name: variant[name] for name in options},
            )
            found: dict[str, Any] = measure_side(
                variant["part"],
                variant["side"],
                setting,
                num_steps=job["num_steps"],
                num_warmup=variant.get("num_warmup", 2),
            )
        except Exception as error:  # The next variant may do better.
            found = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
        gc.collect()
        if job["device"].startswith("cuda"):
            torch.cuda.empty_cache()
        found["wall_s"] = time.monotonic() - began
        print(json.dumps(named | found), flush=True)


if __name__ == "__main__":
    main()
