"""Measurement matrices, initial compressed parameters, and the edge weights of a sparse code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from istanas.errors import ConfigError
from istanas.settings import Matrix
from istanas.sparse.lasso import as_float64, top_support

MATRIX_KINDS = get_args(Matrix)


def measurement_matrix(
    kind: str, n_measurements: int, n_candidates: int, seed: int | torch.Generator
) -> Tensor:
    """Draw a random measurement matrix.

    Args:
        kind: "uniform" draws entries in [0, 1), as published; "gaussian" draws them from N(0, 1) and scales the columns
            to norm 1.
        n_measurements: Number of rows m, >= 1; m >= n is allowed.
        n_candidates: Number of columns n, >= 1.
        seed: A seed >= 0, or a CPU generator to continue with (one generator for the nodes of a cell, in order).

    Returns:
        A, float64 of shape (m, n), the same on every machine.

    Raises:
        ConfigError: If `kind` is unknown, a size is below 1, or the seed is negative.

    Example:
        >>> A = measurement_matrix("gaussian", 7, 14, seed=0)
        >>> A.shape, bool((A.norm(dim=0) - 1.0).abs().max() < 1e-12)
        (torch.Size([7, 14]), True)

    Source: uniform: Yang et al., ISTA-NAS, NeurIPS 2020, published code.
    """
    for name, size in (("n_measurements", n_measurements), ("n_candidates", n_candidates)):
        if size < 1:
            raise ConfigError(f"{size} is too small", field=name, remedy="choose at least 1")
    generator, shape = _generator(seed), (n_measurements, n_candidates)
    if kind == "uniform":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "gaussian":
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(normal, dim=0)
    raise ConfigError(
        f"unknown matrix {kind!r}", field="kind", remedy=f"choose from {', '.join(MATRIX_KINDS)}"
    )


def initial_compressed_alphas(
    n_measurements: int, seed: int | torch.Generator, scale: float = 1e-3
) -> Tensor:
    """Draw the initial compressed parameters of one node: b ~ scale N(0, 1).

    Args:
        n_measurements: Length m, >= 1.
        seed: A seed >= 0, or a CPU generator to continue with (one generator for all nodes, in order).
        scale: Standard deviation, > 0.

    Returns:
        b, float64 of shape (m,); the network casts it to its own type.

    Raises:
        ConfigError: If `n_measurements` is below 1, `scale` is not positive, or the seed is negative.

    Example:
        >>> initial_compressed_alphas(7, seed=0).shape
        torch.Size([7])
    """
    if n_measurements < 1:
        raise ConfigError(
            f"{n_measurements} is too small", field="n_measurements", remedy="choose at least 1"
        )
    if not scale > 0:
        raise ConfigError(
            f"{scale} is not positive, and compressed parameters of 0 have the code 0",
            field="scale",
            remedy="choose a positive number, such as 1e-3",
        )
    return scale * torch.randn(n_measurements, generator=_generator(seed), dtype=torch.float64)


def gram_bias(A: Any, z: Any) -> Any:
    """Return the difference between A^T A z and the code z: (A^T A - I) z.

    Args:
        A: Measurement matrix, (m, n), array or tensor.
        z: Code, (n,), array or tensor; usually truncated to its support.

    Returns:
        The bias, (n,): a float64 tensor if z is a tensor, else a float64 array.

    Example:
        >>> gram_bias([[1.0, 1.0]], [2.0, 0.0])
        array([0., 2.])

    Source: Yang et al., ISTA-NAS, NeurIPS 2020.
    """
    if isinstance(z, Tensor):
        A, z = _tensor(A).to(z.device, torch.float64), z.double()
    else:
        A, z = np.asarray(A, dtype=np.float64), np.asarray(z, dtype=np.float64)
    return A.T @ (A @ z) - z


def edge_weights(
    A: Any,
    b: Any,
    z: Any,
    sparsity: int | None = None,
    *,
    support: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
    groups: Sequence[int] | npt.NDArray[Any] | None = None,
) -> Any:
    """Return the weights of a node's candidates: alpha = A^T b - (A^T A - I) z_S on S, 0 elsewhere.

    z is treated as a constant: d alpha_S / d b = A_S^T. If z is a minimiser and S its support, then
    alpha_S = z_S + l1 sign(z_S).

    Args:
        A: Measurement matrix, (m, n), array or tensor.
        b: Compressed parameters, (m,), array or tensor.
        z: Code, (n,), array or tensor.
        sparsity: If given, S = `top_support(z, sparsity, groups=groups)`.
        support: S itself, instead of `sparsity`. If neither is given, S is the set of the nonzeros of z.
        groups: As in `top_support`.

    Returns:
        alpha, (n,), of the kind, dtype and device of b; differentiable in b if b is a tensor.

    Raises:
        ConfigError: If both `sparsity` and `support` are given, or `sparsity` is out of range.

    Example:
        >>> edge_weights([[1.0, 1.0]], [3.0], [2.0, 1.0], sparsity=1)
        array([3., 0.])

    Source: Yang et al., ISTA-NAS, NeurIPS 2020.
    """
    if sparsity is not None and support is not None:
        raise ConfigError(
            f"{sparsity} is given together with support", field="sparsity", remedy="give one of the two"
        )
    if sparsity is not None:
        support = top_support(z, sparsity, groups=groups)
    elif support is None:
        support = np.flatnonzero(as_float64(z))
    if not isinstance(b, Tensor):
        b = np.asarray(b)
        kind = b.dtype if np.issubdtype(b.dtype, np.floating) else np.dtype(np.float64)
        return (
            _edge_weights(_tensor(A), _tensor(b).double(), _tensor(z), _tensor(support)).numpy().astype(kind)
        )
    return _edge_weights(_tensor(A), b, _tensor(z), _tensor(support))


def _edge_weights(A: Tensor, b: Tensor, z: Tensor, support: Tensor) -> Tensor:
    A, z, S = A.to(b.device, torch.float64), z.to(b.device, torch.float64), support.to(b.device, torch.int64)
    # On S the formula needs only the columns of S: alpha_S = z_S + A_S^T (b - A_S z_S).
    A_S, z_S = A[:, S], z[S]
    alpha_S = z_S + A_S.T @ (b.double() - A_S @ z_S)
    return torch.zeros(A.shape[1], dtype=torch.float64, device=b.device).scatter(0, S, alpha_S).to(b.dtype)


def _tensor(values: Any) -> Tensor:
    # Arrays are copied, because torch warns about read-only arrays, and jobs pass such arrays.
    return values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _generator(seed: int | torch.Generator) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    if seed < 0:
        raise ConfigError(f"{seed} is negative", field="seed", remedy="choose an integer of at least 0")
    return torch.Generator().manual_seed(seed)
