"""How a benchmark measures: interleaved in one process, medians with their spread, peak memory of a fresh process."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        work: what was measured.
        ratio: how many times less than the reference ours needs, or of what `unit` says.
        spread: quartiles of the ratio over the rounds (equal to it where nothing is noisy).
        bound: of the ratio, by `kind` the least or the most that is wanted; None: none.
        ours, reference: in `unit`.
        counted: what noise cannot touch, ours against the reference's.
    """

    work: str
    ratio: float
    spread: tuple[float, float]
    bound: float | None
    ours: float
    reference: float
    unit: str = "s"
    kind: str = "at least"
    counted: str = ""

    @property
    def met(self) -> bool:
        """Whether the ratio is on the right side of its bound."""
        if self.bound is None:
            return True
        return self.ratio >= self.bound if self.kind == "at least" else self.ratio <= self.bound


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each call in each round: all calls once a round, in turn, so that a slow minute hits all."""
    for call in list(calls) * warm_up:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
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
) -> Row:
    """The reference's seconds over ours: a ratio of medians, its spread the quartiles of the rounds' ratios.

    Args:
        work, bound, counted: see `Row`.
        ours, reference: called in turn, `rounds` times.
        repeats: calls of ours for each of the reference's, where it is much faster.
        per: what the seconds printed are divided by, beside `repeats`.
    """

    def many() -> None:
        for _ in range(repeats):
            ours()

    mine, theirs = interleaved([many, reference], rounds)
    mine = [s / repeats for s in mine]
    ratios = sorted(t / m for m, t in zip(mine, theirs, strict=True))
    medians = statistics.median(mine), statistics.median(theirs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Row(
        work, medians[1] / medians[0], (low, high), bound, medians[0] / per, medians[1] / per, counted=counted
    )


def peak_memory(module: str, *arguments: str) -> dict[str, float]:
    """What `python -m module arguments` prints as JSON; it measures itself, being a fresh process."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """k of seconds ~ sizes^k, by least squares on the logarithms.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 9)
    1.0
    """
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def write(rows: Sequence[Row], notes: dict[str, Any], path: Path) -> None:
    """Print the table, and put it with the notes into a JSON file."""
    table = Table(title="against the reference, one thread", caption="spread: quartiles over the rounds")
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
            f"{row.reference:.4g} {row.unit}",
            row.counted,
        )
    Console(width=150).print(table)
    for name, value in notes.items():
        print(f"{name}: {value}")
    path.write_text(
        json.dumps({"rows": [{**asdict(r), "met": r.met} for r in rows], "notes": notes}, indent=2)
    )
