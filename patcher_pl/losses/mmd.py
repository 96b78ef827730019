"""Maximum mean discrepancy: how far apart two samples are."""

import torch
from jaxtyping import Float
from torch import Tensor


def maximum_mean_discrepancy(
    first: Float[Tensor, "rows width"],
    second: Float[Tensor, "rows width"],
    *,
    num_kernels: int,
    kernel_factor: float,
) -> Float[Tensor, ""]:
    """Biased estimate of the squared discrepancy under a sum of Gaussian kernels.

        k(x, y) = sum over i of exp(-||x - y||^2 / (b f^(i - n // 2))),      i = 0, ..., n - 1

    with b the mean of ||x - y||^2 over all pairs of different rows, taken as a constant. Calculates
    in float32 at least.

    Args:
        first: One sample.
        second: The other, of as many rows.
        num_kernels: n (count, >= 1).
        kernel_factor: f (> 1).

    References:
        Gretton et al., 2012, Journal of Machine Learning Research 13, eq. 5.
    """
    rows = torch.cat([first, second])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    squares = rows.square().sum(dim=1)
    # One matrix product instead of all differences; rounding can make the distance of equal rows
    # negative.
    distances = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp_min(0)
    # As in the authors' code, the width is no way to lower the discrepancy: its gradient is cut.
    bandwidth = distances.detach().sum() / (len(rows) * (len(rows) - 1))
    exponents = [number - num_kernels // 2 for number in range(num_kernels)]
    kernels = [torch.exp(-distances / (bandwidth * kernel_factor**power)) for power in exponents]
    kernel = torch.stack(kernels).sum(dim=0)
    half = len(first)
    within = kernel[:half, :half].mean() + kernel[half:, half:].mean()
    return within - kernel[:half, half:].mean() - kernel[half:, :half].mean()
