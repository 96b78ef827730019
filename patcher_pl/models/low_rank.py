"""What a matrix holds most of."""

import torch
from jaxtyping import Float
from torch import Tensor


def main_directions(
    matrix: Float[Tensor, "*batch rows columns"], rank: int
) -> Float[Tensor, "*batch rows directions"]:
    """The left singular vectors of the largest `rank` singular values, or of all there are.

    In float64 where the matrix is, in float32 otherwise.
    """
    exact = matrix if matrix.dtype == torch.float64 else matrix.float()
    return torch.linalg.svd(exact, full_matrices=False).U[..., :rank]


def main_part(
    matrix: Float[Tensor, "*batch rows columns"], rank: int
) -> Float[Tensor, "*batch rows columns"]:
    """The nearest matrix of at most that rank: U_k S_k V_k^T = U_k U_k^T M (Eckart and Young, 1936)."""
    directions = main_directions(matrix, rank)
    return directions @ (directions.mT @ matrix.to(directions.dtype))
