"""The search spaces of these tests: built-in ones at several settings, and one of blocks."""

from dataclasses import dataclass
from typing import Any, ClassVar

from istanas.space import CellSpace, Decision, NasBench201Space, SearchSpace


@dataclass(frozen=True)
class Blocks(SearchSpace):
    """Decisions without networks, which keep different numbers of candidates.

    Args:
        sizes: Number of candidates of each decision.
        sparsity: Number of kept candidates of each decision.
    """

    name: ClassVar[str] = "blocks"

    sizes: tuple[int, ...] = (3, 4, 4)
    sparsity: tuple[int, ...] = (2, 1, 1)

    def make_decisions(self) -> list[Decision]:
        return [
            Decision(f"kind{i}", 0, tuple((f"op{c}", 0) for c in range(k)), s)
            for i, (k, s) in enumerate(zip(self.sizes, self.sparsity, strict=True))
        ]

    def supernet(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def target(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


NAS_BENCH_201 = NasBench201Space()
SPACES: dict[str, SearchSpace] = {
    "nas_bench_201": NAS_BENCH_201,
    "nas_bench_201 without none": NasBench201Space(NAS_BENCH_201.ops[1:]),
    "darts": CellSpace(),
    "darts, one per edge": CellSpace(one_op_per_edge=True),
    "darts, 3 kept": CellSpace(sparsity=3),
    "darts, 2 nodes": CellSpace(n_nodes=2, one_op_per_edge=True),
    "blocks": Blocks(),
}
SMALL: dict[str, SearchSpace] = {
    "nas_bench_201, 2 operations": NasBench201Space(("none", "skip_connect")),
    "darts, 1 node": CellSpace(n_nodes=1, ops=("skip_connect", "max_pool_3x3", "sep_conv_3x3")),
    "darts, 2 nodes, one per edge": CellSpace(
        n_nodes=2, ops=("skip_connect", "max_pool_3x3"), one_op_per_edge=True
    ),
    "blocks": Blocks(),
}
"""Spaces with few architectures, all of which a test can list."""
