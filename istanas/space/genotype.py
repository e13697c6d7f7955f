"""Genotypes: the operations that each node of the two cells keeps, and their JSON form.

The stored order of a node's picks matters, because trained weights follow it. The digest ignores it, because two
genotypes that differ only in this order describe the same network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from istanas.errors import ConfigError, GenotypeError
from istanas.limits import GENOTYPE_BYTES, GENOTYPE_NODES, GENOTYPE_PICKS
from istanas.space.operations import OPERATIONS, skip_ratio
from istanas.space.topology import N_CELL_INPUTS, CellSpace

Pick = tuple[str, int]
Picks = tuple[tuple[Pick, ...], ...]
VERSION = 1
CELLS = ("normal", "reduce")


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network.

    Args:
        normal: For each node of the normal cell its picks (operation, state), at least one. States 0 and 1 are the
            outputs of the two previous cells, and state 2 + i is node i.
        reduce: The same for the reduction cell.
        normal_concat: States that the normal cell's output concatenates, each in 0 .. nodes + 1. Empty: all nodes.
        reduce_concat: The same for the reduction cell, each in 2 .. nodes + 1.

    Raises:
        GenotypeError: If an operation is unknown, a state does not precede its node, a concatenation repeats a state
            or has an invalid one, or there are more nodes or picks than `istanas.limits` allows.

    Example:
        >>> g = Genotype(normal=((("skip_connect", 0),),), reduce=((("max_pool_3x3", 1),),))
        >>> Genotype.from_json(g.to_json()) == g
        True
    """

    normal: Picks
    reduce: Picks
    normal_concat: tuple[int, ...] = ()
    reduce_concat: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for cell in CELLS:
            picks = getattr(self, cell)
            if not getattr(self, f"{cell}_concat"):
                object.__setattr__(
                    self, f"{cell}_concat", tuple(range(N_CELL_INPUTS, N_CELL_INPUTS + len(picks)))
                )
            _check_cell(cell, picks, getattr(self, f"{cell}_concat"))

    def picks(self, cell: str) -> Picks:
        """Return the picks of the "normal" or "reduce" cell."""
        return self.normal if cell == "normal" else self.reduce

    def concat(self, cell: str) -> tuple[int, ...]:
        """Return the concatenated states of the "normal" or "reduce" cell."""
        return self.normal_concat if cell == "normal" else self.reduce_concat

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object as Python lists and dicts."""
        return {
            "version": VERSION,
            "normal": [[list(pick) for pick in node] for node in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [[list(pick) for pick in node] for node in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    def to_json(self) -> str:
        """Return one line of JSON, the inverse of `from_json`."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Genotype:
        """Return the genotype in a parsed JSON object.

        Raises:
            GenotypeError: If a field is missing, unknown or invalid.
        """
        if not isinstance(data, dict):
            raise GenotypeError(
                f"a JSON {type(data).__name__}, not an object",
                field="genotype",
                remedy="give an object with version, normal and reduce",
            )
        version = data.get("version")
        if not _is_int(version) or version != VERSION:
            raise GenotypeError(
                f"unknown version {version!r:.60}", field="genotype.version", remedy=f"use version {VERSION}"
            )
        unknown = sorted(set(data) - {"version", "normal", "reduce", "normal_concat", "reduce_concat"})
        if unknown:
            raise GenotypeError(f"unknown field {unknown[0]!r:.60}", field="genotype", remedy="remove it")
        cells: dict[str, Any] = {}
        for cell in CELLS:
            cells[cell] = _parse_picks(cell, data.get(cell))
            cells[f"{cell}_concat"] = _parse_concat(cell, data.get(f"{cell}_concat"))
        return cls(**cells)

    @classmethod
    def from_json(cls, text: str | bytes) -> Genotype:
        """Return the genotype in a JSON text.

        Raises:
            GenotypeError: If the text is not JSON or not a genotype.
        """
        if len(text) > GENOTYPE_BYTES:
            raise GenotypeError(
                f"larger than {GENOTYPE_BYTES} bytes",
                field="genotype",
                remedy="give the file that a search wrote",
            )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GenotypeError(
                f"not JSON ({error})",
                field="genotype",
                remedy="give the file that a search wrote, or a file with one `Genotype(...)`",
            ) from None
        return cls.from_dict(data)

    def digest(self) -> str:
        """Return the SHA-256 digest (hex) of the canonical JSON, which is equal for equal networks."""
        text = json.dumps(self.canonical().to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def canonical(self) -> Genotype:
        """Return the genotype with each node's picks sorted. It is equal for all genotypes with the same digest."""
        normal, reduce = (tuple(tuple(sorted(node)) for node in self.picks(cell)) for cell in CELLS)
        return replace(self, normal=normal, reduce=reduce)

    def skip_ratio(self) -> float:
        """Return the fraction of skip connections among all picks of both cells, in [0, 1]."""
        return skip_ratio(self.operations())

    def operations(self) -> list[str]:
        """Return the operations of all picks of both cells, with repetitions."""
        return [op for cell in CELLS for node in self.picks(cell) for op, _ in node]

    def __str__(self) -> str:
        lines = []
        for cell in CELLS:
            for i, node in enumerate(self.picks(cell)):
                lines.append(
                    f"{cell:6} node {i}: " + ", ".join(f"{op} <- {state_name(state)}" for op, state in node)
                )
        return "\n".join(lines)


def genotype_from_supports(space: CellSpace, supports: Mapping[str, Sequence[Sequence[int]]]) -> Genotype:
    """Return the genotype whose picks are the candidates that each node's sparse code keeps.

    Args:
        space: The cell space that defines the candidates.
        supports: For "normal" and "reduce", the kept candidates of each node (indices into its sparse code).

    Example:
        >>> space = CellSpace(n_nodes=1, sparsity=1)
        >>> genotype_from_supports(space, {"normal": [[2]], "reduce": [[7]]}).reduce
        ((('max_pool_3x3', 1),),)
    """

    def picks(nodes: Sequence[Sequence[int]]) -> Picks:
        split = [[space.split(int(c)) for c in sorted(node)] for node in nodes]
        return tuple(tuple((space.ops[op], state) for state, op in node) for node in split)

    return Genotype(normal=picks(supports["normal"]), reduce=picks(supports["reduce"]))


def random_genotype(seed: int, space: CellSpace) -> Genotype:
    """Draw a genotype uniformly from a space: the random baseline of a search.

    Each node keeps `space.sparsity` distinct candidates (on distinct edges with `one_op_per_edge`).

    Args:
        seed: An integer >= 0; equal seeds give equal genotypes.
        space: The space to draw from.

    Example:
        >>> random_genotype(0, CellSpace()) == random_genotype(0, CellSpace())
        True
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def support(node: int) -> list[int]:
        if not space.one_op_per_edge:
            return [int(c) for c in rng.choice(space.n_candidates(node), space.sparsity, replace=False)]
        states = rng.choice(space.n_node_edges(node), space.sparsity, replace=False)
        return [space.candidate(node, int(state), int(rng.integers(space.n_ops))) for state in states]

    return genotype_from_supports(
        space, {cell: [support(node) for node in range(space.n_nodes)] for cell in CELLS}
    )


def _check_cell(cell: str, picks: Picks, concat: Iterable[int]) -> None:
    field = f"genotype.{cell}"
    if not picks:
        raise GenotypeError("no nodes", field=field, remedy="give at least one")
    n_picks = sum(map(len, picks))
    if len(picks) > GENOTYPE_NODES or n_picks > GENOTYPE_PICKS:
        raise GenotypeError(
            f"{len(picks)} nodes with {n_picks} inputs are too many",
            field=field,
            remedy=f"use at most {GENOTYPE_NODES} nodes with {GENOTYPE_PICKS} inputs in total",
        )
    for i, node in enumerate(picks):
        if not node:
            raise GenotypeError(f"node {i} has no input", field=field, remedy="give at least one")
        last = i + N_CELL_INPUTS - 1
        for op, state in node:
            _check_operation(op, field, i)
            if not _is_int(state) or not 0 <= state <= last:
                raise GenotypeError(
                    f"state {state!r:.60} of node {i} is out of range",
                    field=field,
                    remedy=f"choose 0 to {last}",
                )
    states = list(concat)
    # The inputs of a reduction cell are twice as large as its nodes, so they cannot be concatenated with nodes.
    first, end = N_CELL_INPUTS if cell == "reduce" else 0, len(picks) + N_CELL_INPUTS
    if len(set(states)) != len(states) or not all(_is_int(s) and first <= s < end for s in states):
        raise GenotypeError(
            f"{states!r:.60} has a repeated or invalid state",
            field=f"{field}_concat",
            remedy=f"give distinct states from {first} to {end - 1}",
        )


def _check_operation(op: str, field: str, node: int) -> None:
    try:
        OPERATIONS.find(op)
    except ConfigError as error:
        raise GenotypeError(f"node {node}: {error.problem}", field=field, remedy=error.remedy) from None


def state_name(state: int) -> str:
    """Return the name of a state: an output of one of the two previous cells, or a node of this cell.

    Args:
        state: Index of the state, >= 0.

    Example:
        >>> state_name(0), state_name(1), state_name(2)
        ('c(k-2)', 'c(k-1)', 'node 0')
    """
    return f"c(k-{N_CELL_INPUTS - state})" if state < N_CELL_INPUTS else f"node {state - N_CELL_INPUTS}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_picks(cell: str, value: Any) -> Picks:
    if not isinstance(value, list) or not all(isinstance(node, list) for node in value):
        raise GenotypeError(
            "not a list of nodes", field=f"genotype.{cell}", remedy="give [[[op, state], ...], ...]"
        )
    for i, node in enumerate(value):
        for pick in node:
            if not (
                isinstance(pick, list) and len(pick) == 2 and isinstance(pick[0], str) and _is_int(pick[1])
            ):
                raise GenotypeError(
                    f"{pick!r:.60} of node {i} is not a pick",
                    field=f"genotype.{cell}",
                    remedy="give [operation, state]",
                )
    return tuple(tuple((op, state) for op, state in node) for node in value)


def _parse_concat(cell: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_is_int(state) for state in value):
        raise GenotypeError(
            f"{value!r:.60} is not a list of states",
            field=f"genotype.{cell}_concat",
            remedy="give a non-empty list of states",
        )
    return tuple(value)
