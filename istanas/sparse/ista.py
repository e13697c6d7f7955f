"""ISTA and FISTA, batched over nodes: the published solver and its accelerated form.

Both converge slowly on the published problem (uniform A, l1 = 1e-5; `homotopy` is exact). They stop when the code is
certified, not when a step is small, because steps become small long before the code is accurate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from istanas.sparse.certificates import certificate
from istanas.sparse.lasso import as_float64, estimated_gap

ISTA_MAX_ITER = 10_000
FISTA_MAX_ITER = 30_000
_CHECK_EVERY = 50


class Iterate(NamedTuple):
    """The codes z (B, n) and the numbers of iterations (B,) of `iterate`."""

    z: Tensor
    n_iter: Tensor


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Return the proximal map of threshold ||.||_1: sign(x) max(|x| - threshold, 0).

    Args:
        x: Any shape.
        threshold: >= 0, broadcastable to x.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5]), torch.tensor(1.0))
        tensor([2., 0.])
    """
    return x - x.clamp(-threshold, threshold)


def iterate(
    A: Tensor,
    b: Tensor,
    l1_weight: float,
    *,
    tol: float = 1e-9,
    max_iter: int | None = None,
    accelerate: bool = False,
) -> Iterate:
    """Run proximal gradient steps, z <- soft_threshold(y - A^T (A y - b) / L, l1 / L), L = ||A||_2^2.

    ISTA: y = z. FISTA: y = z + (t' - 1) / t (z - z'), t = (1 + sqrt(1 + 4 t'^2)) / 2, where a prime marks the previous
    value; t restarts at 1 for a node whose last step was against its momentum.

    Args:
        A: Measurement matrices, float64 (B, m, n).
        b: Compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        tol: Relative duality gap to reach, > 0. The certificate of a node is checked every 50 iterations.
        max_iter: Bound on the iterations; `None` uses 10,000 (ISTA) or 30,000 (FISTA).
        accelerate: Whether to use FISTA instead of ISTA.

    Returns:
        The codes and the numbers of iterations. The caller checks convergence by the certificates.

    Example:
        >>> iterate(torch.eye(2)[None].double(), torch.tensor([[1.0, 0.25]]).double(), 0.5).z
        tensor([[0.5000, 0.0000]], dtype=torch.float64)

    Source: Beck, Teboulle, SIAM J. Imaging Sciences 2009; O'Donoghue, Candes, Adaptive restart, FoCM 2015.
    """
    limit = (FISTA_MAX_ITER if accelerate else ISTA_MAX_ITER) if max_iter is None else max_iter
    lipschitz = torch.linalg.matrix_norm(A, ord=2).square()
    # A matrix of zeros has gradient 0, so any step size is valid.
    step = (1.0 / torch.where(lipschitz > 0, lipschitz, 1.0))[:, None]
    z_out = torch.zeros(A.shape[0], A.shape[2], dtype=A.dtype, device=A.device)
    iterations = torch.zeros(A.shape[0], dtype=torch.int64, device=A.device)
    nodes = torch.arange(A.shape[0], device=A.device)

    # One matrix product per iteration: y - step A^T (A y - b) = pull y + push.
    pull = torch.eye(A.shape[2], dtype=A.dtype, device=A.device) - step[..., None] * (A.mT @ A)
    push = step[..., None] * (A.mT @ b[..., None])
    threshold = step[..., None] * l1_weight
    z = torch.zeros_like(push)
    y, t = z, torch.ones_like(threshold)
    for i in range(limit + 1):
        if i % _CHECK_EVERY == 0 or i == limit:
            done = torch.from_numpy(_certified(A, b, z[..., 0], l1_weight, tol)).to(A.device)
            done |= ~z[..., 0].isfinite().all(1)  # After an overflow, no later code is finite.
            if i == limit:
                done = torch.ones_like(done)
            if done.any():
                z_out[nodes[done]], iterations[nodes[done]] = z[done, :, 0], i
                nodes, A, b, z, y, t = nodes[~done], A[~done], b[~done], z[~done], y[~done], t[~done]
                pull, push, threshold = pull[~done], push[~done], threshold[~done]
            if len(nodes) == 0:
                break
        z_next = soft_threshold(torch.baddbmm(push, pull, y), threshold)
        if accelerate:
            moved = z_next - z
            against = ((y - z_next) * moved).sum(1, keepdim=True) > 0
            t = torch.where(against, 1.0, t)
            t_next = 0.5 + (0.25 + t.square()).sqrt()
            y = torch.addcmul(z_next, moved, (t - 1.0) / t_next)
            t = t_next
        else:
            y = z_next
        z = z_next
    return Iterate(z_out, iterations)


def _certified(A: Tensor, b: Tensor, z: Tensor, l1_weight: float, tol: float) -> npt.NDArray[np.bool_]:
    """Return whether each code is certified. The certificate is computed only where the estimated gap is small."""
    matrices, vectors, codes = as_float64(A), as_float64(b), as_float64(z)
    done = np.asarray(estimated_gap(matrices, vectors, codes, l1_weight) <= tol)
    near = np.flatnonzero(done)
    if len(near):
        done[near] = certificate(matrices[near], vectors[near], codes[near], l1_weight).holds(tol)
    return done
