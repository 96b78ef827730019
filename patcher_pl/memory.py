"""Peak memory of this process."""

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory_gib(device: "torch.device") -> float:
    """Peak memory of this process so far, in GiB.

    Args:
        device: On a GPU, what torch's allocator held there at most; on a CPU, the resident set.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
