"""The tables of a search: `trajectory.csv` and `codes.csv`, to which every epoch adds its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from istanas.search import NodeReport
from istanas.space import CellSpace
from pipeline.base.files import append
from pipeline.runs.directory import ensure_content
from pipeline.runs.layout import CODES_FILE, TRAJECTORY_FILE
from pipeline.training.epoch_record import EpochRecord

TRAJECTORY_COLUMNS = (
    "epoch",
    "cell",
    "node",
    "picks",
    "edge_weights",
    "state",
    "changed",
    "distance",
    "gap",
    "truncation",
    "margin",
)
CODES_COLUMNS = ("epoch", "cell", "node", "state", "op", "magnitude")


class SearchTables:
    """`trajectory.csv` and `codes.csv` of a search, to which every epoch adds its rows.

    Args:
        folder: the run directory.
        space: the cells of the search.
    """

    def __init__(self, folder: Path, space: CellSpace) -> None:
        self._folder, self._space = folder, space
        self._kept: KeptCodes = {}
        self._sizes = {TRAJECTORY_FILE: 0, CODES_FILE: 0}

    def replace(self, records: Iterable[EpochRecord], *, finished: bool = False) -> list[Path]:
        """Make the tables what the records of all epochs done make them.

        Args:
            records: of the epochs, from the first.
            finished: whether no other epoch was begun. Else a kill may have left rows of a later epoch in a table, or
                only a part of the last epoch's rows.

        Returns:
            The tables that no kill has left as they were: they had been damaged.
        """
        contents = {name: io.BytesIO() for name in self._sizes}
        before_last = dict(self._sizes)
        self._kept, self._sizes = {}, dict.fromkeys(self._sizes, 0)
        for record in records:
            before_last = dict(self._sizes)
            for name, rows in self._rows(record).items():
                self._sizes[name] += contents[name].write(rows)
        damaged = []
        for name, content in contents.items():
            file, new = self._folder / name, content.getvalue()
            if not new:
                file.unlink(missing_ok=True)
                continue
            old = file.read_bytes() if file.is_file() else b""
            torn = len(old) >= before_last[name] and new.startswith(old)
            if old != new and (finished or not (torn or old.startswith(new))):
                damaged.append(file)
            ensure_content(file, new)
        return damaged

    def append(self, record: EpochRecord) -> bool:
        """Add the rows of the next epoch; False if a table is shorter than it was left: it has been damaged since."""
        for name, rows in self._rows(record).items():
            try:
                append(self._folder / name, rows, at=self._sizes[name])
            except ValueError:
                return False
            self._sizes[name] += len(rows)
        return True

    def _rows(self, record: EpochRecord) -> dict[str, bytes]:
        """The rows of an epoch by table, with the head of the table before the first; none of what searches nothing."""
        tables = {
            TRAJECTORY_FILE: (TRAJECTORY_COLUMNS, list(trajectory_rows(record))),
            CODES_FILE: (CODES_COLUMNS, list(codes_rows(record, self._space, self._kept))),
        }
        if not tables[TRAJECTORY_FILE][1]:
            return {}
        text = {}
        for name, (columns, rows) in tables.items():
            stream = io.StringIO()
            csv.writer(stream, lineterminator="\n").writerows(
                [columns, *rows] if self._sizes[name] == 0 else rows
            )
            text[name] = stream.getvalue().encode()
        return text


def restored(file: Path) -> str:
    """Return the warning for a table that was damaged."""
    return f"warning: {file}: it was damaged: restored from the log of epochs"


def trajectory_rows(record: EpochRecord) -> Iterator[tuple[Any, ...]]:
    """One row a recovery and node: what it keeps, as `TRAJECTORY_COLUMNS`; epoch 0 is the start, before any training.

    Args:
        record: of any job's epoch; there are no rows unless it searches.
    """
    for epoch, nodes in _recoveries(record):
        for node in nodes:
            yield (
                epoch,
                node.cell,
                node.node,
                " ".join(node.picks),
                " ".join(f"{w:.6g}" for w in node.edge_weights),
                node.state,
                node.changed,
                node.distance,
                node.gap,
                node.truncation,
                node.margin,
            )


KeptCodes = dict[tuple[str, int], list[float]]  # (cell, node) -> magnitudes of its last recovered code


def codes_rows(
    record: EpochRecord, space: CellSpace, kept: KeptCodes
) -> Iterator[tuple[int, str, int, int, str, str]]:
    """Magnitudes of every node's sparse code: `CODES_COLUMNS` of each recovery, node and candidate.

    Left out are epochs whose magnitudes were not recorded, by an early version.

    Args:
        record: of an epoch of a search.
        space: its cells.
        kept: what the epochs before have kept, updated here: a node that is not recovered any more keeps the code
            that it froze with.
    """
    for epoch, nodes in _recoveries(record):
        for node in nodes:
            place = node.cell, node.node
            if node.recovered:
                kept[place] = node.magnitudes
            for candidate, magnitude in enumerate(kept.get(place, ())):
                state, op = space.split(candidate)
                yield epoch, *place, state, space.ops[op], f"{magnitude:.6g}"


def _recoveries(record: EpochRecord) -> Iterator[tuple[int, tuple[NodeReport, ...]]]:
    return iter(()) if record.search is None else record.search.recoveries(record.epoch)
