"""The topology of a cell's search space, and the conversion between (node, edge, operation) and flat indices.

States 0 and 1 are the outputs of the two previous cells, and state 2 + i is node i. Node i may read every state before
it, so it has i + 2 incoming edges. Edges are numbered over the whole cell, starting with those of node 0. The
candidates of a node are its (edge, operation) pairs, row by row: candidate = state * n_ops + op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Le

from istanas.errors import ConfigError
from istanas.registry import Registered
from istanas.settings import PositiveInt
from istanas.space.base import Decision, Drawing, NetworkSize, Pick, SearchSpace, Supports, register_space
from istanas.space.operations import OPERATIONS
from istanas.space.primitives import PRIMITIVES

if TYPE_CHECKING:
    from istanas.candidates import PlacedCandidate
    from istanas.measure import Cost
    from istanas.nets import Supernet, TargetNet
    from istanas.space.genotype import Genotype

N_CELL_INPUTS = 2


@dataclass(frozen=True)
class CellSpace(SearchSpace):
    """The DARTS space: a normal and a reduction cell, in which each node keeps some of its candidates.

    Args:
        n_nodes: Number of intermediate nodes of a cell.
        ops: Candidate operations on each edge, each named once.
        sparsity: Number of operations that each node keeps: at most the candidates of node 0, or 2 with
            one_op_per_edge.
        one_op_per_edge: Whether the operations that a node keeps must lie on different edges. The published code does
            not require it.

    Raises:
        ConfigError: If a field is out of range.

    Example:
        >>> space = CellSpace()
        >>> space.n_edges, space.n_candidates(3), space.candidate(0, 1, 2)
        (14, 35, 9)
        >>> space.split(9)
        (1, 2)
    """

    name: ClassVar[str] = "darts"
    has_auxiliary: ClassVar[bool] = True
    has_partial_channels: ClassVar[bool] = True

    n_nodes: Annotated[int, Ge(1), Le(16)] = field(default=4, metadata={"key": "nodes"})
    ops: tuple[Annotated[str, Registered(OPERATIONS)], ...] = field(default=PRIMITIVES)
    sparsity: PositiveInt = 2
    one_op_per_edge: bool = False

    def __post_init__(self) -> None:
        if self.n_nodes < 1:
            raise ConfigError(f"{self.n_nodes} is too small", field="space.nodes", remedy="use 1 or more")
        for op in self.ops:
            OPERATIONS.find(op)
        if not self.ops or len(set(self.ops)) != len(self.ops):
            raise ConfigError(
                f"{list(self.ops)} is empty or names an operation twice",
                field="space.ops",
                remedy="give each operation once, at least one",
            )
        limit = N_CELL_INPUTS if self.one_op_per_edge else self.n_candidates(0)
        if not 1 <= self.sparsity <= limit:
            what = "edges, each with one operation" if self.one_op_per_edge else "candidates"
            raise ConfigError(
                f"{self.sparsity} cannot be chosen among the first node's {limit} {what}",
                field="space.sparsity",
                remedy=f"choose 1 to {limit}",
            )

    @property
    def n_ops(self) -> int:
        """Number of candidate operations on an edge."""
        return len(self.ops)

    @property
    def n_edges(self) -> int:
        """Number of edges of a cell: the sum of (node + 2) over its nodes."""
        return self.first_edge(self.n_nodes)

    def n_node_edges(self, node: int) -> int:
        """Return the number of edges that end in `node`: one from every state before it."""
        return node + N_CELL_INPUTS

    def n_candidates(self, node: int) -> int:
        """Return the number of candidates (edge, operation) of `node`, which is the length of its sparse code."""
        return self.n_node_edges(node) * self.n_ops

    def first_edge(self, node: int) -> int:
        """Return the index, in the cell, of the first edge that ends in `node`."""
        return node * N_CELL_INPUTS + node * (node - 1) // 2

    def edge(self, node: int, state: int) -> int:
        """Return the index, in the cell, of the edge from `state` to `node`."""
        return self.first_edge(node) + state

    def candidate(self, node: int, state: int, op: int) -> int:
        """Return the index of (edge from `state`, `op`) in the sparse code of `node`.

        Raises:
            IndexError: If `node` has no such candidate.
        """
        if not 0 <= state < self.n_node_edges(node) or not 0 <= op < self.n_ops:
            raise IndexError(f"node {node} has no candidate (state {state}, op {op})")
        return state * self.n_ops + op

    def split(self, candidate: int) -> tuple[int, int]:
        """Return (state, op) of a candidate, the inverse of `candidate`."""
        return divmod(candidate, self.n_ops)

    # ---------- the interface of `SearchSpace`

    def make_decisions(self) -> list[Decision]:
        """Return the nodes of both cells."""
        return [
            Decision(
                kind,
                node,
                tuple((op, state) for state in range(self.n_node_edges(node)) for op in self.ops),
                self.sparsity,
                one_per_edge=self.one_op_per_edge,
            )
            for kind in ("normal", "reduce")
            for node in range(self.n_nodes)
        ]

    def genotype(self, supports: Supports) -> Genotype:
        """Return the genotype that keeps these candidates."""
        from istanas.space.genotype import Genotype

        return Genotype(
            normal=self.picks("normal", supports["normal"]), reduce=self.picks("reduce", supports["reduce"])
        )

    def check(self, genotype: Genotype) -> None:
        """Check that a genotype belongs to the DARTS space. Its cells may have any number of nodes and picks."""
        self.check_name(genotype)

    def supernet(
        self,
        size: NetworkSize,
        alpha_size: Callable[[Decision], int],
        *,
        auxiliary: bool = False,
        partial: int = 1,
    ) -> Supernet:
        """Return the network of a search."""
        from istanas.nets import Supernet

        return Supernet(
            self,
            size.init_channels,
            size.layers,
            size.num_classes,
            stem=size.stem,
            in_channels=size.in_channels,
            op_batchnorm=size.op_batchnorm,
            auxiliary=auxiliary,
            alpha_size=alpha_size,
            partial=partial,
        )

    def target(self, genotype: Genotype, size: NetworkSize, *, auxiliary: bool = False) -> TargetNet:
        """Return the network of a genotype."""
        from istanas.nets import TargetNet

        return TargetNet(
            genotype,
            size.init_channels,
            size.layers,
            size.num_classes,
            stem=size.stem,
            auxiliary=auxiliary,
            op_batchnorm=size.op_batchnorm,
            in_channels=size.in_channels,
        )

    def cost(self, genotype: Genotype, size: NetworkSize, shape: tuple[int, int, int]) -> Cost:
        """Return parameters and multiply-adds of a genotype's network, computed from the genotype."""
        from istanas.measure import target_cost

        return target_cost(
            genotype,
            init_channels=size.init_channels,
            layers=size.layers,
            num_classes=size.num_classes,
            shape=shape,
            stem=size.stem,
            op_batchnorm=size.op_batchnorm,
        )

    def placed_candidates(self, size: NetworkSize, shape: tuple[int, int, int]) -> Iterator[PlacedCandidate]:
        """Yield every candidate in every cell of the network."""
        from istanas.candidates import cell_candidates

        return cell_candidates(self, size, shape)

    def read_shares(self, genotype: Genotype, size: NetworkSize) -> tuple[float, ...]:
        """Return the share of its two inputs that each cell reads; 0 for one that does not run."""
        from istanas.candidates import cell_read_shares

        return cell_read_shares(genotype, size)

    def state_name(self, state: int) -> str:
        """Return the name of a state: an output of one of the two previous cells, or a node of this cell."""
        return state_name(state)

    def drawing(self, genotype: Genotype) -> Mapping[str, Drawing]:
        """Return the drawings of both cells."""
        return {kind: cell_drawing(genotype.picks(kind), genotype.concat(kind)) for kind in genotype.kinds}


def state_name(state: int) -> str:
    """Return the name of a state: an output of one of the two previous cells, or a node of this cell.

    Args:
        state: Index of the state, >= 0.

    Example:
        >>> state_name(0), state_name(1), state_name(2)
        ('c(k-2)', 'c(k-1)', 'node 0')
    """
    return f"c(k-{N_CELL_INPUTS - state})" if state < N_CELL_INPUTS else f"node {state - N_CELL_INPUTS}"


def cell_drawing(picks: Sequence[Sequence[Pick]], concat: Iterable[int]) -> Drawing:
    """Return the drawing of a cell, from its inputs on the left to the concatenation on the right.

    Args:
        picks: For each node its inputs (operation, state).
        concat: The states that the output concatenates.
    """
    n_nodes = len(picks)
    output = N_CELL_INPUTS + n_nodes
    states = ("$c_{k-2}$", "$c_{k-1}$", *(f"node {i}" for i in range(n_nodes)), "concat")
    chosen: list[tuple[int, int, str | None, int, int]] = [
        (state, N_CELL_INPUTS + node, op, node, position)
        for node, row in enumerate(picks)
        for position, (op, state) in enumerate(row)
    ]
    joined: list[tuple[int, int, str | None, int, int]] = [(state, output, None, -1, -1) for state in concat]
    return Drawing(states, (*chosen, *joined), n_nodes, frozenset({0, 1, output}))


register_space(CellSpace)
