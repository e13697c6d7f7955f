"""The file of a table of latencies: reading, writing, and the predictions of the table that a configuration names.

`pipeline.training.latency_measurement` measures a table.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from istanas.errors import ConfigError
from istanas.latency import LatencyPredictor, LatencyTable, differences, latency_predictor
from istanas.limits import RECORD_BYTES, read_at_most
from istanas.space import NetworkSize
from pipeline.base.files import atomic_write
from pipeline.config.schema import Config
from pipeline.config.threads import threads_in_process
from pipeline.training.latency_measurement import machine_here

KEY = "search.latency_table"
_REMEDY = "measure it again with istanas latency"


def write_table(file: Path, table: LatencyTable) -> None:
    """Write a table as JSON.

    Raises:
        OSError: If the file cannot be written.
    """
    atomic_write(file, json.dumps(asdict(table), indent=1) + "\n")


def read_table(file: Path) -> LatencyTable:
    """Read a table.

    Raises:
        ConfigError: If the file is missing or is not a table of latencies.
    """
    try:
        table = TypeAdapter(LatencyTable).validate_json(read_at_most(file, RECORD_BYTES), strict=True)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror})",
            field=KEY,
            remedy="give a file that istanas latency has written, and that all workers can read",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = " ".join(
            f"{where}: {first['msg']}".lstrip(": ").split()
        )  # keys of the file may contain line breaks
        raise ConfigError(
            f"{file} is not a table of latencies ({what:.200})", field=KEY, remedy=_REMEDY
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{file} is not a table of latencies ({error})", field=KEY, remedy=_REMEDY
        ) from None
    if len({each.variant for each in table.candidates}) < len(table.candidates):
        raise ConfigError(f"{file} has a candidate twice", field=KEY, remedy=_REMEDY)
    return table


def configured_table(config: Config) -> LatencyTable | None:
    """Return the table that a configuration names, or `None`.

    Raises:
        ConfigError: See `read_table`.
    """
    file = getattr(config.search, "latency_table", None)
    return None if file is None else read_table(Path(file).expanduser())


def configured_predictor(
    config: Config, size: NetworkSize, shape: tuple[int, int, int]
) -> LatencyPredictor | None:
    """Return the predictions of the table that a configuration names, or `None`.

    Raises:
        ConfigError: See `read_table` and `istanas.latency.latency_predictor`.
    """
    table = configured_table(config)
    if table is None:
        return None
    try:
        return latency_predictor(table, config.space.build(), size, shape)
    except ConfigError as error:
        raise ConfigError(
            f"{config.search.latency_table} {error.problem}",  # type: ignore[attr-defined]
            field=f"search.{error.field}",
            remedy=error.remedy,
        ) from None


def table_warnings(config: Config) -> list[str]:
    """Return a line about each property of the table that a configuration names which makes its predictions doubtful.

    These are another machine than this one, batches of several pictures, and latencies that are all 0.

    Raises:
        ConfigError: See `read_table`.
    """
    table = configured_table(config)
    if table is None:
        return []
    there = table.machine
    here = machine_here(there.backend, there.device, threads_in_process(config.runtime.threads), there.dtype)
    found = differences(there, here)
    lines = [f"latencies of another machine: {'; '.join(found)}"] if found else []
    if table.batch_size != 1:
        lines.append(f"latencies of batches of {table.batch_size} pictures, not of one picture")
    if all(each.median_ms == 0 for each in table.candidates):
        lines.append(f"all latencies of candidates are 0, so that all networks seem equally fast; {_REMEDY}")
    return [f"{KEY}: {line}" for line in lines]
