"""The measurement of a table of latencies, which a search can use as the cost of its candidates.

Nothing is written to a run directory or to MLflow.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table

from istanas.distributed import Ranks
from istanas.latency import latency_predictor, relative_errors
from pipeline.base.extras import check_extra
from pipeline.base.files import writable_file
from pipeline.base.text import duration
from pipeline.config.schema import Config
from pipeline.jobs.context import say_to
from pipeline.jobs.lifecycle import load_data, settled
from pipeline.training.build import check_networks, network_size, shape_of, target_sizes
from pipeline.training.compute import compute_for, describe_place
from pipeline.training.latency_measurement import Backend, measure_latencies, spread
from pipeline.training.latency_tables import write_table

LARGE_ERROR = 0.1  # of the predictions, above which the command warns


class LatencyResult(TypedDict):
    """What `--json` prints."""

    table: str
    candidates: list[dict[str, Any]]  # see `istanas.latency.CandidateLatency`
    networks: list[dict[str, Any]]  # random ones, see `istanas.latency.NetworkLatency`
    fixed_ms: float
    scale: float
    errors: list[float]  # of the predictions, for networks that were measured as a check
    spread: float  # see `pipeline.training.latency_measurement.spread`
    seconds: float


def run_latency(
    config: Config, *, backend: Backend, batch_size: int, runs: int, out: Path, console: Console
) -> LatencyResult:
    """Measure the latencies of the candidates of a configuration's space in its target network, and write the table.

    Args:
        config: The whole configuration. Its section `runtime` has device, precision and threads.
        backend: What executes the networks.
        batch_size: Pictures in a batch, >= 1.
        runs: Number of runs of each candidate, >= 2.
        out: The file of the table.
        console: Where lines for the user are written.

    Raises:
        ConfigError: The file cannot be written, or the settings do not fit the pictures or this machine.
        IstanasError: A package of the backend is missing.
    """
    target, say = writable_file(out, "--out"), say_to(console)
    if backend == "onnxruntime":
        check_extra("export", "--backend onnxruntime")
    config = settled(config, console)
    dataset = load_data(config, console)
    check_networks(config, dataset, ("search" if config.trains_target else "retrain",))
    compute = compute_for(config.runtime)
    space, size = config.space.build(), network_size(target_sizes(config), dataset)
    shape = shape_of(dataset)
    say(f"{describe_place(compute, Ranks())}, {backend}, batch size {batch_size}")
    start = time.perf_counter()
    table = measure_latencies(
        space, size, shape, compute, backend=backend, batch_size=batch_size, runs=runs, say=say
    )
    write_table(target, table)
    return {
        "table": str(out),
        "candidates": [asdict(each) for each in table.candidates],
        "networks": [asdict(each) for each in (*table.references, *table.checks)],
        "fixed_ms": table.fixed_ms,
        "scale": table.scale,
        "errors": relative_errors(latency_predictor(table, space, size, shape), table.checks),
        "spread": spread(table.candidates),
        "seconds": time.perf_counter() - start,
    }


def print_latency(result: LatencyResult, console: Console) -> None:
    """Print the latencies of the candidates, and what the networks have in common."""
    table = Table(title="milliseconds of the candidates")
    table.add_column("operation")
    for heading in ("input", "output", "median", "quartiles"):
        table.add_column(heading, justify="right")
    for each in result["candidates"]:
        shapes = ("x".join(map(str, each[key])) for key in ("input", "output"))
        table.add_row(each["operation"], *shapes, f"{each['median_ms']:.4f}", _quartiles(each))
    console.print(table)
    say, whole = say_to(console), [each["median_ms"] for each in result["networks"]]
    say(f"random networks: {min(whole):.3g} to {max(whole):.3g} ms, fixed parts: {result['fixed_ms']:.3g} ms")
    error = statistics.median(result["errors"])
    say(
        f"check: {len(result['errors'])} other networks are predicted with a median error of {error:.1%}, "
        f"at most {max(result['errors']):.1%}"
    )
    if error > LARGE_ERROR:
        say("warning: the predictions are poor; measure again with more --runs, while the machine is idle")
    say(f"spread: the quartiles of a candidate differ by {result['spread']:.0%} (median over the candidates)")
    say(f"table: {result['table']} ({duration(result['seconds'])})")


def _quartiles(latency: dict[str, Any]) -> str:
    return f"{latency['lower_ms']:.4f} to {latency['upper_ms']:.4f}"
