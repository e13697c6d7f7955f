"""Interleaved measurements, medians with their spread, and the table of the benchmarks."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        work: What was measured.
        ratio: The figure with a bound: the reference's cost over ours (kind "at least"), our cost over the reference's
            ("at most"), microseconds per node, or an exponent.
        spread: Quartiles of the ratio over the rounds; both equal the ratio if the measurement has no noise.
        bound: The smallest or largest ratio allowed, depending on `kind`; None: there is no bound.
        ours, reference: Our cost and the reference's, in `unit`; None: there is no reference.
        counted: Figures without noise, such as FLOPs, ours against the reference's.
    """

    work: str
    ratio: float
    spread: tuple[float, float]
    bound: float | None
    ours: float
    reference: float | None = None
    unit: str = "s"
    kind: str = "at least"
    counted: str = ""

    @property
    def met(self) -> bool:
        """Whether the ratio is within its bound."""
        if self.bound is None:
            return True
        return self.ratio >= self.bound if self.kind == "at least" else self.ratio <= self.bound


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its child processes that have ended."""
    return sum(os.times()[:4])


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Return the seconds of each call in each round, after a round of warm-up.

    Each round runs all calls in turn, so that other work on the machine slows all of them.
    """
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    return seconds


def compare(
    work: str,
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    bound: float | None,
    *,
    rounds: int,
    repeats: int = 1,
    per: float = 1.0,
    counted: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Return a row with the reference's seconds over ours, see `ratio_of_medians`.

    Args:
        work, bound, counted: See `Row`.
        ours, reference: Called in turn, `rounds` times.
        repeats: Calls of ours for each call of the reference, for work in which ours is much faster.
        per: Divisor of the printed seconds, in addition to `repeats`.
        clock: `cpu_seconds` for work in other processes, whose wall-clock time depends on the number of idle cores.
    """

    def many() -> None:
        for _ in range(repeats):
            ours()

    mine, theirs = interleaved([many, reference], rounds, clock)
    mine = [s / repeats for s in mine]
    ratio, spread = ratio_of_medians(theirs, mine)
    medians = (statistics.median(seconds) / per for seconds in (mine, theirs))
    return Row(work, ratio, spread, bound, *medians, counted=counted)


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two medians, and the quartiles of the rounds' ratios.

    >>> ratio_of_medians([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    (2.0, (2.0, 3.0))
    """
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(above) / statistics.median(below), quartiles(ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile of at least two values; of three, the smallest and the largest."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return k of seconds ~ sizes^k, by least squares on the logarithms.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 9)
    1.0
    """
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def growth(work: str, sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> Row:
    """Return a row without a bound: the exponent with which a time grows with a size, of the medians and each round.

    Args:
        work: See `Row`.
        sizes: At least three sizes in increasing order.
        seconds: The seconds of each size in each round.
    """
    medians = [statistics.median(times) for times in seconds]
    spread = quartiles([exponent(sizes, times) for times in zip(*seconds, strict=True)])
    points = ", ".join(f"{size:,}: {s:.3g} s" for size, s in zip(sizes, medians, strict=True))
    return Row(work, exponent(sizes, medians), spread, None, medians[-1], counted=f"exponent; {points}")


def write(rows: Sequence[Row], seconds: float, path: Path | None) -> None:
    """Print the table and the total seconds; with a path, write both there as JSON."""
    table = Table(
        title="against the reference, one thread",
        caption="spread: quartiles over the rounds, the widest where several active sets were measured",
    )
    for heading in ("work", "ratio", "spread", "wanted", "ours", "reference", "counted"):
        table.add_column(
            heading, overflow="fold", justify="left" if heading in ("work", "counted") else "right"
        )
    for row in rows:
        wanted = "" if row.bound is None else f"{row.kind} {row.bound:g}{'' if row.met else ' MISSED'}"
        table.add_row(
            row.work,
            f"{row.ratio:.2f}",
            f"{row.spread[0]:.2f}..{row.spread[1]:.2f}",
            wanted,
            f"{row.ours:.4g} {row.unit}",
            "" if row.reference is None else f"{row.reference:.4g} {row.unit}",
            row.counted,
        )
    Console(width=150).print(table)
    print(f"{seconds:.0f} s in all")
    if path is not None:
        table_of = [{**asdict(row), "met": row.met} for row in rows]
        path.write_text(json.dumps({"rows": table_of, "seconds": seconds}, indent=2))
