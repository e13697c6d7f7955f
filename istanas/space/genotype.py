"""Genotypes: the candidates that each decision of a search space keeps, and their JSON form.

The stored order of a node's picks matters, because trained weights follow it. The digest ignores it, because two
genotypes that differ only in this order describe the same network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from istanas.errors import ConfigError, GenotypeError
from istanas.limits import GENOTYPE_BYTES, GENOTYPE_NODES, GENOTYPE_PICKS
from istanas.space.base import SPACES, Pick, SearchSpace
from istanas.space.operations import OPERATIONS, skip_ratio
from istanas.space.topology import N_CELL_INPUTS, CellSpace, state_name

Picks = tuple[tuple[Pick, ...], ...]
VERSION = 1
DARTS = CellSpace.name
CELLS = ("normal", "reduce")
_OPERATION = re.compile(r"[A-Za-z0-9_.+-]{1,64}")  # also the names that user spaces give to their candidates
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")  # files and elements of pages have these names


@dataclass(frozen=True)
class Genotype:
    """The architecture of a network: the two cells of the DARTS space, or the choices in another space.

    Args:
        normal: For each node of the normal cell its picks (operation, state), at least one. States 0 and 1 are the
            outputs of the two previous cells, and state 2 + i is node i.
        reduce: The same for the reduction cell.
        normal_concat: States that the normal cell's output concatenates, each in 0 .. nodes + 1. Empty: all nodes.
        reduce_concat: The same for the reduction cell, each in 2 .. nodes + 1.
        space: Name of the search space.
        choices: In other spaces than "darts", pairs (kind of decision, picks of each decision of this kind). The space
            checks whether the picks are its candidates, see `istanas.space.SearchSpace.check`.

    Raises:
        GenotypeError: If an operation is unknown, a state does not precede its node, a concatenation repeats a state
            or has an invalid one, or there are more nodes or picks than `istanas.limits` allows.

    Example:
        >>> g = Genotype(normal=((("skip_connect", 0),),), reduce=((("max_pool_3x3", 1),),))
        >>> Genotype.from_json(g.to_json()) == g
        True
        >>> Genotype(space="chain", choices=(("block", ((("conv3", 0),), (("skip", 0),))),)).picks("block")[1]
        (('skip', 0),)
    """

    normal: Picks = ()
    reduce: Picks = ()
    normal_concat: tuple[int, ...] = ()
    reduce_concat: tuple[int, ...] = ()
    space: str = DARTS
    choices: tuple[tuple[str, Picks], ...] = ()

    def __post_init__(self) -> None:
        if self.space != DARTS:
            _check_choices(self)
            return
        for cell in CELLS:
            picks = getattr(self, cell)
            if not getattr(self, f"{cell}_concat"):
                object.__setattr__(
                    self, f"{cell}_concat", tuple(range(N_CELL_INPUTS, N_CELL_INPUTS + len(picks)))
                )
            _check_cell(cell, picks, getattr(self, f"{cell}_concat"))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of decisions: "normal" and "reduce" in the DARTS space."""
        return CELLS if self.space == DARTS else tuple(kind for kind, _ in self.choices)

    def picks(self, kind: str) -> Picks:
        """Return the picks of the decisions of one kind."""
        if self.space != DARTS:
            return dict(self.choices)[kind]
        return self.normal if kind == "normal" else self.reduce

    def concat(self, cell: str) -> tuple[int, ...]:
        """Return the concatenated states of the "normal" or "reduce" cell."""
        return self.normal_concat if cell == "normal" else self.reduce_concat

    def with_picks(self, kind: str, picks: Picks) -> Genotype:
        """Return the genotype with other picks of one kind.

        Raises:
            GenotypeError: If they are invalid.
        """
        if self.space != DARTS:
            return replace(self, choices=tuple((k, picks if k == kind else old) for k, old in self.choices))
        return replace(self, normal=picks) if kind == "normal" else replace(self, reduce=picks)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object as Python lists and dicts."""
        if self.space != DARTS:
            return {
                "version": VERSION,
                "space": self.space,
                "choices": {kind: _as_lists(picks) for kind, picks in self.choices},
            }
        return {
            "version": VERSION,
            "normal": _as_lists(self.normal),
            "normal_concat": list(self.normal_concat),
            "reduce": _as_lists(self.reduce),
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
        space = data.get("space", DARTS)
        fields = {"normal", "reduce", "normal_concat", "reduce_concat"} if space == DARTS else {"choices"}
        unknown = sorted(set(data) - {"version", "space"} - fields)
        if unknown:
            raise GenotypeError(f"unknown field {unknown[0]!r:.60}", field="genotype", remedy="remove it")
        if space != DARTS:
            return cls(space=_parse_space(space), choices=_parse_choices(data.get("choices")))
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
        ordered = {kind: tuple(tuple(sorted(node)) for node in self.picks(kind)) for kind in self.kinds}
        if self.space != DARTS:
            return replace(self, choices=tuple(ordered.items()))
        return replace(self, normal=ordered["normal"], reduce=ordered["reduce"])

    def skip_ratio(self) -> float:
        """Return the fraction of skip connections among all picks, in [0, 1]."""
        return skip_ratio(self.operations())

    def operations(self) -> list[str]:
        """Return the operations of all picks, with repetitions."""
        return [op for kind in self.kinds for node in self.picks(kind) for op, _ in node]

    @property
    def reference(self) -> str | None:
        """A short text that names the genotype, such as its number in a benchmark, or `None` if there is none."""
        return SPACES[self.space].reference(self) if self.space in SPACES else None

    def __str__(self) -> str:
        text = SPACES[self.space].text(self) if self.space in SPACES else None
        if text is not None:
            return text
        lines = []
        for kind in self.kinds:
            for i, node in enumerate(self.picks(kind)):
                if self.space == DARTS:
                    text = ", ".join(f"{op} <- {state_name(state)}" for op, state in node)
                    lines.append(f"{kind:6} node {i}: {text}")
                else:
                    lines.append(f"{kind} {i}: {', '.join(op for op, _ in node)}")
        return "\n".join(lines)


def genotype_from_supports(space: SearchSpace, supports: Mapping[str, Sequence[Sequence[int]]]) -> Genotype:
    """Return the genotype whose picks are the candidates that each decision keeps.

    Args:
        space: The search space that defines the candidates.
        supports: For each kind, such as "normal", the kept candidates of each decision (indices into its sparse code).

    Example:
        >>> space = CellSpace(n_nodes=1, sparsity=1)
        >>> genotype_from_supports(space, {"normal": [[2]], "reduce": [[7]]}).reduce
        ((('max_pool_3x3', 1),),)
    """
    return space.genotype(supports)


def random_genotype(seed: int, space: SearchSpace) -> Genotype:
    """Draw a genotype uniformly from a space: the random baseline of a search.

    In the DARTS space each node keeps `space.sparsity` distinct candidates (on distinct edges with `one_op_per_edge`).

    Args:
        seed: An integer >= 0; equal seeds give equal genotypes.
        space: The space to draw from.

    Example:
        >>> random_genotype(0, CellSpace()) == random_genotype(0, CellSpace())
        True
    """
    return space.random(seed)


def _as_lists(picks: Picks) -> list[list[list[Any]]]:
    return [[list(pick) for pick in node] for node in picks]


def _check_choices(genotype: Genotype) -> None:
    """Check the form of the choices in another space than DARTS."""
    field = "genotype.choices"
    if genotype.normal or genotype.reduce or genotype.normal_concat or genotype.reduce_concat:
        raise GenotypeError(
            f"cells of the space {DARTS} in the space {genotype.space}", field=field, remedy="give choices"
        )
    if not genotype.choices or not all(picks and all(picks) for _, picks in genotype.choices):
        raise GenotypeError("a decision without a choice", field=field, remedy="give at least one for each")
    for kind, _ in genotype.choices:
        if _KIND.fullmatch(kind) is None:
            raise GenotypeError(
                f"{kind!r:.60} cannot name a kind of decision",
                field=field,
                remedy="use a letter followed by at most 63 letters, digits and underscores",
            )
    names = [op for _, picks in genotype.choices for node in picks for op, _ in node]
    invalid = [op for op in names if _OPERATION.fullmatch(op) is None]
    if invalid:
        raise GenotypeError(
            f"{invalid[0]!r:.60} cannot name an operation",
            field=field,
            remedy="use letters, digits and underscores",
        )
    n_decisions = sum(len(picks) for _, picks in genotype.choices)
    n_picks = sum(len(node) for _, picks in genotype.choices for node in picks)
    if n_decisions > GENOTYPE_NODES or n_picks > GENOTYPE_PICKS:
        raise GenotypeError(
            f"{n_decisions} decisions with {n_picks} choices are too many",
            field=field,
            remedy=f"use at most {GENOTYPE_NODES} decisions with {GENOTYPE_PICKS} choices in total",
        )


def _parse_space(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier() or len(value) > 64:
        raise GenotypeError(
            f"{value!r:.60} is not the name of a search space", field="genotype.space", remedy="give its name"
        )
    return value


def _parse_choices(value: Any) -> tuple[tuple[str, Picks], ...]:
    if not isinstance(value, dict) or not all(isinstance(kind, str) for kind in value):
        raise GenotypeError(
            "not an object", field="genotype.choices", remedy="give {kind: [[[op, state], ...], ...]}"
        )
    return tuple((kind, _parse_picks(f"choices.{kind:.20}", picks)) for kind, picks in value.items())


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
        remedy = f"{error.remedy}, or name its plugin with --plugin FILE"
        raise GenotypeError(f"node {node}: {error.problem}", field=field, remedy=remedy) from None


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
