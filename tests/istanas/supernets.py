"""Seeded supernets with given or random codes, and counted forward calls, for the tests of networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from istanas.nets import NodeCode, Supernet
from istanas.search.sparse_coding import draw_matrices
from istanas.space import PUBLISHED, CellSpace
from istanas.sparse import top_support

TWO_STAGE = PUBLISHED["ISTA_twostage"]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def supernet(
    supports: dict[str, list[tuple[int, ...]]] | None = None,
    *,
    space: CellSpace | None = None,
    channels: int = 2,
    layers: int = 3,
    seed: int = 0,
    **options: Any,
) -> Supernet:
    """Return a seeded supernet in float64 with random codes, or codes with the given supports."""
    space = space or CellSpace()
    torch.manual_seed(seed)
    net = Supernet(space, channels, layers, 5, **options).double()
    with torch.no_grad():
        for b in net.alphas():
            b.normal_()
    install(net, supports, seed)
    return net


def install(net: Supernet, supports: dict[str, list[tuple[int, ...]]] | None, seed: int = 0) -> None:
    """Install random codes, or codes with the given supports."""
    codes: dict[str, list[NodeCode]] = {}
    for cell, matrices in draw_matrices(net.space, net.alphas()[0].numel(), "uniform", seed).items():
        codes[cell] = []
        for node, A in enumerate(matrices):
            z = rand(A.shape[1], seed=100 * seed + node)
            support = supports[cell][node] if supports else tuple(top_support(z, net.space.sparsity).tolist())
            codes[cell].append(NodeCode(A, z, support))
    net.install_codes(codes)


@contextmanager
def counted(net: nn.Module) -> Iterator[dict[str, int]]:
    """Count the forward calls of every module without children, by name."""
    calls: dict[str, int] = {}
    handles = []
    for name, module in net.named_modules():
        if not list(module.children()):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            handles.append(module.register_forward_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


SUPPORTS: dict[str, list[tuple[int, ...]]] = {
    "normal": [(2, 10), (3, 19), (0, 27), (26, 33)],
    "reduce": [(1, 11), (6, 18), (12, 13), (20, 34)],
}
