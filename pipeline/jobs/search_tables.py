"""The tables of a search, to which every epoch appends its rows.

They are `trajectory.csv`, `codes.csv` and, in a search by measurements, `measurements.csv`. They have no times, so that
a search that was interrupted has the same tables as an undisturbed one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from istanas.effects import architecture
from istanas.search import NodeReport
from istanas.search.measured import Measurement
from istanas.settings import Fidelity
from istanas.space import Genotype, SearchSpace
from pipeline.base.files import append, ensure_content
from pipeline.runs.layout import CODES_FILE, MEASUREMENTS_FILE, TRAJECTORY_FILE
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
MEASUREMENTS_COLUMNS = (
    "measurement",
    "architecture",
    "candidates",
    "epochs",
    "layers",
    "loss",
    "top1",
    "predicted",
    "deviation",
)


class SearchTables:
    """The tables of a search, to which every epoch appends its rows.

    Args:
        folder: The run directory.
        space: The space of the search.
    """

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        self._folder, self._space = folder, space
        self._kept: KeptCodes = {}
        self._sizes = {TRAJECTORY_FILE: 0, CODES_FILE: 0, MEASUREMENTS_FILE: 0}

    def replace(self, records: Iterable[EpochRecord], *, finished: bool = False) -> list[Path]:
        """Rewrite the tables from the records of all finished epochs.

        Args:
            records: The epochs, from the first.
            finished: Whether the search has finished. Otherwise a killed process may have left rows of a later epoch,
                or only a part of the last epoch's rows; such a table does not count as damaged.

        Returns:
            The tables that were damaged.
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
        """Append the rows of the next epoch; return False if a table was truncated since the last call."""
        for name, rows in self._rows(record).items():
            try:
                append(self._folder / name, rows, at=self._sizes[name])
            except ValueError:
                return False
            self._sizes[name] += len(rows)
        return True

    def _rows(self, record: EpochRecord) -> dict[str, bytes]:
        """Return an epoch's rows by table, the first ones with the header; empty if the epoch has no search."""
        tables = {
            TRAJECTORY_FILE: (TRAJECTORY_COLUMNS, list(trajectory_rows(record))),
            CODES_FILE: (CODES_COLUMNS, list(codes_rows(record, self._space, self._kept))),
        }
        if not tables[TRAJECTORY_FILE][1]:
            return {}
        if measurements := list(measurement_rows(record, self._space)):
            tables[MEASUREMENTS_FILE] = (MEASUREMENTS_COLUMNS, measurements)
        text = {}
        for name, (columns, rows) in tables.items():
            stream = io.StringIO()
            csv.writer(stream, lineterminator="\n").writerows(
                [columns, *rows] if self._sizes[name] == 0 else rows
            )
            text[name] = stream.getvalue().encode()
        return text


def restored(file: Path) -> str:
    """Return the warning about a damaged table that was restored."""
    return f"warning: {file}: damaged: restored from the epoch log"


def trajectory_rows(record: EpochRecord) -> Iterator[tuple[Any, ...]]:
    """Yield one row of `TRAJECTORY_COLUMNS` for each recovery and node; epoch 0 is the start, before any training.

    Args:
        record: An epoch of any job; only an epoch of a search has rows.
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


KeptCodes = dict[tuple[str, int], list[float]]  # (cell, node) -> magnitudes of the last recovered code


def codes_rows(
    record: EpochRecord, space: SearchSpace, kept: KeptCodes
) -> Iterator[tuple[int, str, int, int, str, str]]:
    """Yield the magnitudes of the sparse codes: one row of `CODES_COLUMNS` for each recovery, node and candidate.

    Epochs whose magnitudes an early version did not record are left out.

    Args:
        record: An epoch of a search.
        space: The space of the search.
        kept: The last code of each node, updated here: a frozen node is not recovered any more and keeps its code.
    """
    for epoch, nodes in _recoveries(record):
        for node in nodes:
            place = node.cell, node.node
            if node.recovered:
                kept[place] = node.magnitudes
            candidates = space.decisions[node.cell][node.node].candidates
            for (op, state), magnitude in zip(candidates, kept.get(place, ()), strict=False):
                yield epoch, *place, state, op, f"{magnitude:.6g}"


def measurement_of(record: EpochRecord, space: SearchSpace) -> Measurement | None:
    """Return the measurement that an epoch has finished, or `None`.

    Args:
        record: An epoch of a search.
        space: The space of the search.
    """
    m = record.metrics
    if "measured/epochs" not in m:
        return None
    trained = Genotype.from_json(record.found().trained_genotype)
    return Measurement(
        architecture(space, space.supports(trained)),
        Fidelity(int(m["measured/layers"]), int(m["measured/epochs"])),
        m.get("valid/loss", math.inf),  # nothing is measured after a training that has diverged
        m.get("valid/top1", 0.0),
    )


def measurement_rows(record: EpochRecord, space: SearchSpace) -> Iterator[tuple[Any, ...]]:
    """Yield a row of `MEASUREMENTS_COLUMNS` if the epoch has finished a measurement.

    The predicted score and its standard deviation are those before the measurement. They are empty before the third
    measurement, because a posterior requires two.

    Args:
        record: An epoch of a search.
        space: The space of the search.
    """
    measured = measurement_of(record, space)
    if measured is None:
        return
    m = record.metrics
    predicted = [m.get(f"measured/{name}") for name in ("predicted", "predicted_deviation")]
    yield (
        int(m["measured/count"]),
        space.text(Genotype.from_json(record.found().trained_genotype)) or "",
        " ".join(map(str, measured.kept)),
        measured.fidelity.epochs,
        measured.fidelity.layers,
        measured.loss,
        measured.top1,
        # A mean of 0 is written without the rounding error of its sum, and without its sign.
        *("" if each is None else f"{round(each, 6) + 0.0:.6g}" for each in predicted),
    )


def _recoveries(record: EpochRecord) -> Iterator[tuple[int, tuple[NodeReport, ...]]]:
    return iter(()) if record.search is None else record.search.recoveries(record.epoch)
