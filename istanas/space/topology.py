"""The topology of a cell's search space, and the conversion between (node, edge, operation) and flat indices.

States 0 and 1 are the outputs of the two previous cells, and state 2 + i is node i. Node i may read every state before
it, so it has i + 2 incoming edges. Edges are numbered over the whole cell, starting with those of node 0. The
candidates of a node are its (edge, operation) pairs, row by row: candidate = state * n_ops + op.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from istanas.errors import ConfigError
from istanas.space.operations import OPERATIONS
from istanas.space.primitives import PRIMITIVES

N_CELL_INPUTS = 2


@dataclass(frozen=True)
class CellSpace:
    """The search space of a cell: its nodes, its candidate operations, and how many of them a node keeps.

    Args:
        n_nodes: Number of intermediate nodes, >= 1.
        ops: Names of the candidate operations, registered ones, at least one, without repetition.
        sparsity: Number of operations that a node keeps, 1 .. candidates of node 0 (with `one_op_per_edge`: 1 .. 2).
        one_op_per_edge: Whether the picks of a node must lie on different edges. The published code does not require
            it.

    Raises:
        ConfigError: If a field is out of range.

    Example:
        >>> space = CellSpace()
        >>> space.n_edges, space.n_candidates(3), space.candidate(0, 1, 2)
        (14, 35, 9)
        >>> space.split(9)
        (1, 2)
    """

    n_nodes: int = 4
    ops: tuple[str, ...] = field(default=PRIMITIVES)
    sparsity: int = 2
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

    def edge_groups(self, node: int) -> npt.NDArray[np.int64] | None:
        """Return the edge of every candidate of `node` if picks may not share an edge, else `None`."""
        if not self.one_op_per_edge:
            return None
        return np.repeat(np.arange(self.n_node_edges(node)), self.n_ops)
