"""Parser of the text form of DARTS, `Genotype(normal=[('skip_connect', 0), ...], ...)`, which is never evaluated.

Python parses the text to a syntax tree. Only literals and two calls are accepted in it: `Genotype(...)` as the whole
text, and `range(...)` of integers for a concatenation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from istanas.errors import GenotypeError
from istanas.limits import GENOTYPE_NODES, GENOTYPE_PICKS, GENOTYPE_TEXT_BYTES
from istanas.space.base import SPACES
from istanas.space.genotype import Genotype, Picks
from istanas.space.topology import N_CELL_INPUTS

_PICKS_FORM = "give [('operation', state), ...]"
_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_MOST_STATES = GENOTYPE_NODES + N_CELL_INPUTS
_PICKS_OF_A_NODE = 2  # DARTS lists the picks of all nodes of a cell in one list, two for each node.
# A text may begin with comments, a name and a module, as in `# found\nDARTS_V2 = genotypes.Genotype(`.
_BEGINNING = re.compile(r"(?:\s|#[^\n]*\n)*([A-Za-z_]\w*\s*=\s*)?([A-Za-z_]\w*\.)?Genotype\s*\(", re.ASCII)


def genotype_from_text(text: str) -> Genotype:
    """Return the genotype in a file's text, which is JSON or a text form of a search space.

    Args:
        text: JSON as `Genotype.to_json` writes it; `Genotype(...)` or `NAME = Genotype(...)` as in DARTS; or a text
            form of another space, such as the strings of NAS-Bench-201.

    Raises:
        GenotypeError: If the text is not a genotype.

    Example:
        >>> picks = "[('skip_connect', 0), ('sep_conv_3x3', 1)]"
        >>> genotype_from_text(f"Genotype(normal={picks}, normal_concat=[2], reduce={picks}, reduce_concat=[2])").normal
        ((('skip_connect', 0), ('sep_conv_3x3', 1)),)
    """
    text = text.removeprefix("\ufeff")  # Some editors begin a UTF-8 file with this mark.
    if _BEGINNING.match(text) is None:
        named = parsed_genotype(text)
        return Genotype.from_json(text) if named is None else named
    if len(text) > GENOTYPE_TEXT_BYTES:
        raise GenotypeError(
            f"larger than {GENOTYPE_TEXT_BYTES} bytes",
            field="genotype",
            remedy="give the file of one genotype",
        )
    call = _only_call(text)
    given = _arguments(call)
    cells: dict[str, Any] = {}
    for cell in ("normal", "reduce"):
        cells[cell] = _picks(cell, given[cell])
        cells[f"{cell}_concat"] = _concat(cell, given[f"{cell}_concat"])
    return Genotype(**cells)


def parsed_genotype(text: str) -> Genotype | None:
    """Return the genotype in the text form of a registered search space, or `None` if no space has this form.

    Args:
        text: The text, see `SearchSpace.parse`.

    Raises:
        GenotypeError: If the text has the form of a space, but is no genotype.

    Example:
        >>> parsed_genotype("nas_bench_201:0").space, parsed_genotype("ISTA_twostage")
        ('nas_bench_201', None)
    """
    for space in SPACES.values():
        found = space().parse(text)
        if found is not None:
            return found
    return None


def _only_call(text: str) -> ast.Call:
    """Return the call of `Genotype` that is the whole text, whether or not it is assigned to a name."""
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise GenotypeError(
            f"not a valid `Genotype(...)` ({reason})",
            field="genotype",
            remedy="give the text of one genotype",
        ) from None
    statement = statements[0]
    call = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if len(statements) != 1 or not isinstance(call, ast.Call) or not _calls(call, "Genotype"):
        raise GenotypeError(
            "the text has more than one `Genotype(...)`",
            field="genotype",
            remedy="give a file with one genotype and nothing else",
        )
    return call


def _calls(node: ast.expr, name: str) -> bool:
    """Return whether a node calls `name` or `MODULE.name`."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.attr == name
    return isinstance(called, ast.Name) and called.id == name


def _arguments(call: ast.Call) -> dict[str, ast.expr]:
    """Return the expression of each field. Every field must be given exactly once."""
    remedy = f"give {', '.join(_FIELDS)}, each once"
    if len(call.args) > len(_FIELDS):
        raise GenotypeError(f"{len(call.args)} values are too many", field="genotype", remedy=remedy)
    given = dict(zip(_FIELDS, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg not in _FIELDS or keyword.arg in given:
            raise GenotypeError(
                f"field {keyword.arg!r:.60} is unknown or given twice", field="genotype", remedy=remedy
            )
        given[keyword.arg] = keyword.value
    for name in _FIELDS:
        if name not in given:
            raise GenotypeError("missing", field=f"genotype.{name}", remedy=remedy)
    return given


def _picks(cell: str, node: ast.expr) -> Picks:
    """Return the picks of a cell, two for each node."""
    if not isinstance(node, ast.List | ast.Tuple):
        raise _invalid(cell, "not a list of picks", _PICKS_FORM, node)
    if len(node.elts) > GENOTYPE_PICKS or len(node.elts) % _PICKS_OF_A_NODE:
        raise GenotypeError(
            f"{len(node.elts)} inputs are odd or too many",
            field=f"genotype.{cell}",
            remedy=f"give {_PICKS_OF_A_NODE} for each node, at most {GENOTYPE_PICKS} in total",
        )
    picks = [_pick(cell, element) for element in node.elts]
    return tuple(tuple(picks[i : i + _PICKS_OF_A_NODE]) for i in range(0, len(picks), _PICKS_OF_A_NODE))


def _pick(cell: str, node: ast.expr) -> tuple[str, int]:
    if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == 2:
        op, state = node.elts
        if isinstance(op, ast.Constant) and isinstance(op.value, str):
            return op.value, _number(cell, state)
    raise _invalid(cell, "not a list of picks", _PICKS_FORM, node)


def _concat(cell: str, node: ast.expr) -> tuple[int, ...]:
    """Return the states of a concatenation, which is a list of integers or a range.

    The length of a range is checked before it is expanded.
    """
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
                f"more than {_MOST_STATES} states",
                field=f"genotype.{field}",
                remedy="give the states of the cell's nodes",
            )
        states: Sequence[int] = range(first, end)
    elif isinstance(node, ast.List | ast.Tuple):
        states = [_number(field, element) for element in node.elts]
    else:
        raise _invalid(field, "neither a list of states nor a range", "give [2, 3] or range(2, 4)", node)
    if len(states) == 0:
        raise GenotypeError(
            "no states", field=f"genotype.{field}", remedy="give the states of the cell's output"
        )
    return tuple(states)


def _number(field: str, node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise _invalid(field, "not an integer", "write the number as digits", node)


def _invalid(field: str, what: str, remedy: str, node: ast.expr) -> GenotypeError:
    where = f"line {node.lineno}, column {node.col_offset + 1}"
    return GenotypeError(f"{what} ({where})", field=f"genotype.{field}", remedy=remedy)
