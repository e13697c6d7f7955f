"""A table that fits every terminal: it drops columns or prints one block per row, and never breaks names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_PROSE = 24  # smallest width of a column of wrapped text, unless its longest word is longer


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    Args:
        heading: The heading. If the column has numbers, the heading may be broken at spaces.
        right: Whether the column has numbers, which are aligned to the right.
        rank: Columns of the highest rank are dropped first; those of rank 0 never are.
        prose: Whether the column has sentences, which may be wrapped between words.
    """

    heading: str
    right: bool = False
    rank: int = 0
    prose: bool = False

    @property
    def head(self) -> str:
        """The heading as it is printed."""
        return self.heading.replace(" ", "\n") if self.right else self.heading


class FittedTable:
    """A table of texts that rich can print.

    Print it with `console.print(table, crop=False)`, so that names longer than the terminal are not cut off.

    Args:
        columns, rows: The whole table.
        title: Title above the table, or None.
        rest: Text that says where the user finds the dropped columns.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str]],
        *,
        title: str | None = None,
        rest: str = "--csv and --json have everything",
    ) -> None:
        self.columns, self.rows, self.title, self._rest = tuple(columns), rows, title, rest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        places = self.places(options.max_width)
        if places is None:
            if self.title:
                yield Text(self.title)
            for row in self.rows:
                yield from (Text(line, no_wrap=True, overflow="ignore") for line in self._block(row))
            return
        yield self._table(places)
        dropped = [column.heading.strip() for i, column in enumerate(self.columns) if i not in places]
        if dropped and self.rows:
            yield Text(f"columns that did not fit: {', '.join(dropped)}; {self._rest}")

    def places(self, width: int) -> list[int] | None:
        """Return the columns that fit into a width; None if the columns of rank 0 do not fit."""
        places = list(range(len(self.columns)))
        widths = [self._width(place) for place in places]
        while sum(widths[place] for place in places) + len(places) + 1 > width:
            last = max(places, key=lambda place: (self.columns[place].rank, place))
            if self.columns[last].rank == 0:
                return None
            places.remove(last)
        return places

    def _width(self, place: int) -> int:
        from rich.cells import cell_len

        column = self.columns[place]
        cells = [row[place] for row in self.rows]
        lines = [line for text in (column.head, *cells) for line in text.split("\n")]
        widest = max(map(cell_len, lines))
        if column.prose:
            words = max((cell_len(word) for text in cells for word in text.split()), default=0)
            return min(widest, max(words, _PROSE))
        return widest

    def _table(self, places: Sequence[int]) -> RenderableType:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=0)
        for place in places:
            column = self.columns[place]
            table.add_column(
                column.head,
                justify="right" if column.right else "left",
                no_wrap=not column.prose,
                min_width=self._width(place),
            )
        for row in self.rows:
            table.add_row(*(row[place] for place in places))
        return table

    def _block(self, row: Sequence[str]) -> Iterator[str]:
        """Yield a row as lines: the first column, then each other column that is not empty."""
        yield row[0]
        indent = " " * (len(row[0]) - len(row[0].lstrip()) + 2)
        for column, text in zip(self.columns[1:], row[1:], strict=True):
            if text:
                yield f"{indent}{column.heading}: {text}"
