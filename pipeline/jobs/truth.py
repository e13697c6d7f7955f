"""A table of true accuracies, which scores the results of searches.

A search never reads such a table. `check_table` returns everything about it except its accuracies, so that mistakes are
reported before any work; `read_truth` is called when all searches have finished.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from istanas.errors import ConfigError, DataError, GenotypeError
from istanas.limits import TABLE_BYTES, read_at_most
from istanas.space import Genotype, SearchSpace
from pipeline.base.text import one_line

ARCHITECTURE = "architecture"  # heading of the first column


@dataclass(frozen=True)
class TableFacts:
    """What is known about a table before the searches: everything except the accuracies.

    Args:
        digest: Digest of its text.
        rows: Number of architectures.
        columns: Names of all columns with accuracies.
        column: Name of the column that scores.
    """

    digest: str
    rows: int
    columns: tuple[str, ...]
    column: str


@dataclass(frozen=True)
class Score:
    """The score of an architecture. Accuracies are fractions.

    Args:
        accuracy: Its true accuracy, in [0, 1].
        rank: 1 for the best architecture of the table; equal accuracies have the same rank.
        regret: The best accuracy of the table minus its own, >= 0.
        accuracies: Column -> its accuracy, for all columns.
    """

    accuracy: float
    rank: int
    regret: float
    accuracies: Mapping[str, float]


class Truth:
    """The true accuracies of the architectures of a space.

    Args:
        facts: The facts about the table.
        accuracies: Digest of a genotype -> its accuracies as fractions, in the order of `facts.columns`.
    """

    def __init__(self, facts: TableFacts, accuracies: Mapping[str, tuple[float, ...]]) -> None:
        self.facts, self._accuracies = facts, accuracies
        self._place = facts.columns.index(facts.column)
        self._ascending = sorted(row[self._place] for row in accuracies.values())

    @property
    def best(self) -> float:
        """The best accuracy of the table."""
        return self._ascending[-1]

    @property
    def mean(self) -> float:
        """The mean accuracy, which is the expected accuracy of a random architecture of the table."""
        return math.fsum(self._ascending) / len(self._ascending)

    @property
    def chance_rank(self) -> float:
        """The expected rank of a random architecture of the table, without ties."""
        return (len(self._ascending) + 1) / 2

    def score(self, genotype: Genotype) -> Score:
        """Return the score of an architecture.

        Raises:
            DataError: If the table has no row for it.
        """
        try:
            accuracies = self._accuracies[genotype.digest()]
        except KeyError:
            raise DataError(
                f"has no row for the architecture {genotype!s:.200}, which a search found",
                field="--table",
                remedy="add the row and run the same command again; finished searches are not repeated",
            ) from None
        accuracy = accuracies[self._place]
        better = len(self._ascending) - bisect.bisect_right(self._ascending, accuracy)
        return Score(
            accuracy=accuracy,
            rank=1 + better,
            regret=round(self.best - accuracy, 12),
            accuracies=dict(zip(self.facts.columns, accuracies, strict=True)),
        )


def check_table(file: Path, space: SearchSpace, column: str | None = None) -> TableFacts:
    """Check a table of true accuracies, and return what is known about it without its accuracies.

    The table is a CSV file, which may be compressed (`.gz`). Its first column, `architecture`, has the texts that
    `space.parse` reads; each further column has accuracies in per cent.

    Args:
        file: The file.
        space: The space of the architectures.
        column: The column that scores; None for the first one with accuracies.

    Raises:
        ConfigError: If the file is missing, broken, or not such a table; the message names the line.
    """
    facts, _ = _read(file, space, column)
    return facts


def read_truth(file: Path, space: SearchSpace, facts: TableFacts) -> Truth:
    """Read a table that `check_table` has checked.

    Args:
        file: The file.
        space: The space of the architectures.
        facts: What `check_table` returned.

    Raises:
        ConfigError: If the table is no longer valid, or has changed.
    """
    now, accuracies = _read(file, space, facts.column)
    if now != facts:
        raise _problem(file, "has changed since the command began", "run the same command again")
    return Truth(facts, accuracies)


def _read(
    file: Path, space: SearchSpace, column: str | None
) -> tuple[TableFacts, dict[str, tuple[float, ...]]]:
    if type(space).parse is SearchSpace.parse:
        raise ConfigError(
            f"architectures of {space.name} have no text form, so that no table can name them",
            field="space.name",
            remedy="use a space whose class defines parse(), such as nas_bench_201",
        )
    text = _text(file)
    lines = csv.reader(io.StringIO(text), strict=True)
    try:
        columns = _columns(file, next(lines, []), column)
        accuracies: dict[str, tuple[float, ...]] = {}
        first: dict[str, int] = {}
        for row in lines:
            if not row:
                continue
            number = lines.line_num
            digest, values = _row(file, number, row, columns, space)
            if digest in first:
                raise _problem(
                    file,
                    f"line {number}: the architecture of line {first[digest]} again ({row[0]:.100})",
                    "keep one of both rows",
                )
            first[digest], accuracies[digest] = number, values
    except csv.Error as error:
        raise _problem(file, f"line {lines.line_num}: not CSV ({error})", "write it as CSV") from None
    if not accuracies:
        raise _problem(file, "has no rows", "give a row for each architecture")
    for place, name in enumerate(columns):
        highest = max(values[place] for values in accuracies.values())
        if highest <= 0.01:  # values up to 1, which were divided by 100
            raise _problem(
                file,
                f"column {name}: the highest accuracy is {100 * highest:g}",
                "give accuracies in per cent, in 0..100",
            )
    facts = TableFacts(
        digest=hashlib.sha256(text.encode()).hexdigest(),
        rows=len(accuracies),
        columns=columns,
        column=columns[0] if column is None else column,
    )
    return facts, accuracies


def _text(file: Path) -> str:
    """Return the text of a table, decompressed."""
    try:
        data = read_at_most(file, TABLE_BYTES)
        if file.suffix == ".gz":
            with gzip.open(io.BytesIO(data)) as compressed:
                data = compressed.read(TABLE_BYTES + 1)
            if len(data) > TABLE_BYTES:
                raise ValueError(f"larger than {TABLE_BYTES} bytes when decompressed")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise _problem(file, "no such file", "give a CSV file with true accuracies") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _problem(file, f"cannot be read ({one_line(error)})", "give a CSV or .csv.gz file") from None


def _columns(file: Path, heading: list[str], column: str | None) -> tuple[str, ...]:
    """Return the names of the columns with accuracies."""
    if len(heading) < 2 or heading[0] != ARCHITECTURE or "" in heading or len(set(heading)) < len(heading):
        raise _problem(
            file,
            f"its first line is {','.join(heading)!r:.100}",
            f"name the columns there: {ARCHITECTURE}, then one or more with accuracies, each name once",
        )
    if column is not None and column not in heading[1:]:
        raise ConfigError(
            f"no column of {file}",
            field=f"--column {column!r:.80}",
            remedy=f"choose {', '.join(heading[1:])}",
        )
    return tuple(heading[1:])


def _row(
    file: Path, number: int, row: list[str], columns: tuple[str, ...], space: SearchSpace
) -> tuple[str, tuple[float, ...]]:
    """Return the digest and the accuracies, as fractions, of a row."""
    if len(row) != 1 + len(columns):
        raise _problem(
            file,
            f"line {number}: {len(row)} values for {1 + len(columns)} columns",
            "give one value for each column",
        )
    return _digest(file, number, row[0], space), tuple(_fractions(file, number, row[1:], columns))


def _digest(file: Path, number: int, text: str, space: SearchSpace) -> str:
    try:
        genotype = space.parse(text)
        if genotype is not None:
            space.check_name(genotype)
            return genotype.digest()
        problem = "not a text form of the space"
    except GenotypeError as error:
        problem = error.problem
    raise _problem(
        file,
        f"line {number}: {text!r:.100} is no architecture of {space.name} ({problem:.200})",
        "correct the row, or set space.name",
    )


def _fractions(file: Path, number: int, texts: list[str], columns: tuple[str, ...]) -> Iterator[float]:
    for name, text in zip(columns, texts, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise _problem(
                file, f"line {number}, column {name}: {text!r:.40} is not in 0..100", "give it in per cent"
            )
        yield round(value / 100, 12)  # 0.9376 instead of 0.9376000000000001


def _problem(file: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(problem, field=f"--table {file}", remedy=remedy)
