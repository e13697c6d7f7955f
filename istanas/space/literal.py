"""A genotype in the text form of DARTS, `Genotype(normal=[('skip_connect', 0), ...], ...)`: parsed, never evaluated.

The text becomes Python's syntax tree, of which only literals and two calls by name are read: `Genotype` outside,
`range` of whole numbers for a concatenation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from istanas.errors import GenotypeError
from istanas.limits import GENOTYPE_NODES, GENOTYPE_PICKS, GENOTYPE_TEXT_BYTES
from istanas.space.genotype import Genotype, Picks
from istanas.space.topology import N_CELL_INPUTS

_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_MOST_STATES = GENOTYPE_NODES + N_CELL_INPUTS
_PICKS_OF_A_NODE = 2  # DARTS lists all picks of a cell in one row: each node has two
# Comments, a name, and a module before it, as in `# found\nDARTS_V2 = genotypes.Genotype(`.
_BEGINNING = re.compile(r"(?:\s|#[^\n]*\n)*([A-Za-z_]\w*\s*=\s*)?([A-Za-z_]\w*\.)?Genotype\s*\(", re.ASCII)


def genotype_from_text(text: str) -> Genotype:
    """Return the genotype in a file's text, which is JSON or the text form of DARTS.

    Args:
        text: JSON as `Genotype.to_json` writes it, or `Genotype(...)`, or `NAME = Genotype(...)`.

    Raises:
        GenotypeError: it holds no genotype.

    Example:
        >>> picks = "[('skip_connect', 0), ('sep_conv_3x3', 1)]"
        >>> genotype_from_text(f"Genotype(normal={picks}, normal_concat=[2], reduce={picks}, reduce_concat=[2])").normal
        ((('skip_connect', 0), ('sep_conv_3x3', 1)),)
    """
    text = text.removeprefix("\ufeff")  # of editors that mark UTF-8
    if _BEGINNING.match(text) is None:
        return Genotype.from_json(text)
    if len(text) > GENOTYPE_TEXT_BYTES:
        raise GenotypeError(
            f"genotype is larger than {GENOTYPE_TEXT_BYTES} bytes: give the file of one genotype"
        )
    call = _only_call(text)
    given = _arguments(call)
    cells: dict[str, Any] = {}
    for cell in ("normal", "reduce"):
        cells[cell] = _picks(cell, given[cell])
        cells[f"{cell}_concat"] = _concat(cell, given[f"{cell}_concat"])
    return Genotype(**cells)


def _only_call(text: str) -> ast.Call:
    """The call of Genotype that a text consists of, perhaps assigned to a name."""
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise GenotypeError(
            f"genotype is not a valid `Genotype(...)` ({reason}): give the text of one genotype"
        ) from None
    statement = statements[0]
    call = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if len(statements) != 1 or not isinstance(call, ast.Call) or not _calls(call, "Genotype"):
        raise GenotypeError(
            "genotype file has something beside a `Genotype(...)`: give a file with one genotype alone"
        )
    return call


def _calls(node: ast.expr, name: str) -> bool:
    """Whether a node is a call of a name, or of a name of a module."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.attr == name
    return isinstance(called, ast.Name) and called.id == name


def _arguments(call: ast.Call) -> dict[str, ast.expr]:
    """Field -> what was written for it; every field exactly once."""
    if len(call.args) > len(_FIELDS):
        raise GenotypeError(f"genotype has {len(call.args)} values: give {', '.join(_FIELDS)}")
    given = dict(zip(_FIELDS, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg not in _FIELDS or keyword.arg in given:
            raise GenotypeError(
                f"genotype field {keyword.arg!r:.60} is unknown or given twice: give {', '.join(_FIELDS)}"
            )
        given[keyword.arg] = keyword.value
    for name in _FIELDS:
        if name not in given:
            raise GenotypeError(f"genotype field {name!r} is missing: give {', '.join(_FIELDS)}")
    return given


def _picks(cell: str, node: ast.expr) -> Picks:
    """The picks of a cell, two for each node."""
    if not isinstance(node, ast.List | ast.Tuple):
        raise _refused(cell, "no list of ('operation', state)", node)
    if len(node.elts) > GENOTYPE_PICKS or len(node.elts) % _PICKS_OF_A_NODE:
        raise GenotypeError(
            f"genotype field {cell!r} has {len(node.elts)} inputs: give {_PICKS_OF_A_NODE} for each node, at most "
            f"{GENOTYPE_PICKS}"
        )
    picks = [_pick(cell, element) for element in node.elts]
    return tuple(tuple(picks[i : i + _PICKS_OF_A_NODE]) for i in range(0, len(picks), _PICKS_OF_A_NODE))


def _pick(cell: str, node: ast.expr) -> tuple[str, int]:
    if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == 2:
        op, state = node.elts
        if isinstance(op, ast.Constant) and isinstance(op.value, str):
            return op.value, _number(cell, state)
    raise _refused(cell, "no list of ('operation', state)", node)


def _concat(cell: str, node: ast.expr) -> tuple[int, ...]:
    """The states of a concatenation: a list of numbers, or a range that is short enough to be one."""
    field = f"{cell}_concat"
    if (
        isinstance(node, ast.Call)
        and _calls(node, "range")
        and not node.keywords
        and 1 <= len(node.args) <= 2
    ):
        first, end = (0, *(_number(field, argument) for argument in node.args))[-2:]
        if end - first > _MOST_STATES:
            raise GenotypeError(
                f"genotype field {field!r} has more than {_MOST_STATES} states: give those of its nodes"
            )
        states: Sequence[int] = range(first, end)
    elif isinstance(node, ast.List | ast.Tuple):
        states = [_number(field, element) for element in node.elts]
    else:
        raise _refused(field, "neither a list of states nor range(...)", node)
    if len(states) == 0:
        raise GenotypeError(f"genotype field {field!r} is empty: give the states of the cell's output")
    return tuple(states)


def _number(field: str, node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise _refused(field, "no whole number", node)


def _refused(field: str, what: str, node: ast.expr) -> GenotypeError:
    return GenotypeError(
        f"genotype field {field!r} is {what}: line {node.lineno}, column {node.col_offset + 1}"
    )
