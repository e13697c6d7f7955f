"""`make bench`: time and memory of each kind of work against the reference, as a table and as bench.json.

The exit code is 1 if a row misses its bound.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from istanas.data import Augmentation, augment
from istanas.search.sparse_coding import draw_matrices
from istanas.space import PUBLISHED, CellSpace
from istanas.sparse import recover_nodes
from pipeline.training.profiling import count_flops
from tests.benchmarks import compiled, harness, large_pictures, methods, multiprocess, reference, shards
from tests.benchmarks.harness import Row, compare
from tests.benchmarks.memory import peaks as measure_peaks
from tests.benchmarks.pairs import (
    Pair,
    TargetPair,
    make_search,
    ours_of,
    random_batch,
    random_codes,
    two_stage_step,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SEEDS = (0, 1, 2)  # of random active sets
BASE = {"channels": 8, "layers": 5, "batch": 16}  # `growth` increases one of these sizes at a time


class _Operators(TorchDispatchMode):
    """Counts the calls of torch's operators except views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operators(*calls: Callable[[], Any]) -> str:
    """Return how many of torch's operators each call runs, as text."""
    counts = []
    for call in calls:
        with _Operators() as seen:
            call()
        counts.append(f"{seen.count:,}")
    return f"{' / '.join(counts)} operators"


def counted(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
    """Return the FLOPs and operators of our call and of the reference's, as text."""
    flops = " / ".join(f"{count_flops(call) / 1e9:.2f}" for call in (ours, theirs))
    return f"{flops} GFLOP, {operators(ours, theirs)}"


def over_seeds(measure: Callable[[int], Row]) -> Row:
    """Return the median row of the random active sets, with the widest quartiles of all rows."""
    rows = sorted((measure(seed) for seed in SEEDS), key=lambda row: row.ratio)
    spread = min(row.spread[0] for row in rows), max(row.spread[1] for row in rows)
    return replace(rows[len(rows) // 2], spread=spread)


def search_step(c: int, layers: int, n: int, bound: float, rounds: int, one_stage: bool = False) -> Row:
    def measure(seed: int) -> Row:
        pair = Pair(c, layers, one_stage=one_stage, seed=seed)
        theirs = [random_batch(n, 32, i) for i in range(1 if one_stage else 2)]
        ours = [ours_of(batch) for batch in theirs]
        calls = (lambda: pair.our_step(*ours), lambda: pair.their_step(*theirs))
        name = f"{'one' if one_stage else 'two'}-stage step, {c} channels / {layers} layers / batch {n}"
        return compare(name, *calls, bound, rounds=rounds, counted=counted(*calls))

    return over_seeds(measure)


def against_dense(c: int, layers: int, n: int, bound: float, rounds: int) -> Row:
    pair, dense = Pair(c, layers), reference.Optimizers(reference.DenseSupernet(c, layers))
    theirs = [random_batch(n, 32, i) for i in range(2)]
    ours = [ours_of(batch) for batch in theirs]
    calls = (lambda: pair.our_step(*ours), lambda: reference.two_stage_step(dense, theirs[0], theirs[1]))
    name = f"the step at {c} / {layers} / {n} against a dense first-order DARTS step"
    return compare(name, *calls, bound, rounds=rounds, repeats=3, counted=counted(*calls))


def validation(c: int, layers: int, n: int, bound: float, rounds: int) -> Row:
    def measure(seed: int) -> Row:
        pair = Pair(c, layers, seed=seed)
        pair.net.eval()
        pair.reference.eval()
        theirs = random_batch(n, 32, 0)
        ours = ours_of(theirs)

        @torch.no_grad()
        def our_forward() -> None:
            pair.net(ours[0])

        @torch.no_grad()
        def their_forward() -> None:
            pair.reference(theirs[0])

        name = f"validation forward, {c} / {layers} / {n}"
        calls = (our_forward, their_forward)
        return compare(name, *calls, bound, rounds=rounds, counted=counted(*calls))

    return over_seeds(measure)


def retraining(c: int, layers: int, n: int, bound: float, rounds: int) -> Row:
    pair = TargetPair(PUBLISHED["ISTA_twostage"], c, layers, drop_path=0.1)
    theirs = random_batch(n, 32, 0)
    ours = ours_of(theirs)
    calls = (lambda: pair.our_step(ours), lambda: pair.their_step(theirs))
    name = f"retraining step, {c} / {layers} / {n}, published cell"
    return compare(name, *calls, bound, rounds=rounds, counted=counted(*calls))


def augmentation(n: int, bound: float, rounds: int) -> Row:
    pictures = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    pil = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    transform, generator = reference.pil_augmentation(MEAN, STD), torch.Generator().manual_seed(0)
    ours = Augmentation(crop_padding=4, horizontal_flip=True, cutout=16)
    calls = (
        lambda: augment(pictures, ours, MEAN, STD, generator),
        lambda: torch.stack([transform(picture) for picture in pil]),
    )
    name = f"augmentation of 32x32 pictures, {n} at a time (seconds a picture)"
    return compare(name, *calls, bound, rounds=rounds, per=n, counted=f"{operators(*calls)} of torch")


def recovery(rounds: int) -> list[Row]:
    space, generator = CellSpace(), np.random.default_rng(0)
    matrices = [A.numpy() for cell in draw_matrices(space, 7, "uniform", 0).values() for A in cell]
    vectors = [generator.normal(0, 0.3, 7) for _ in matrices]
    results = recover_nodes(matrices, vectors)
    assert all(result.converged for result in results)
    supports = [result.support for result in results]
    again = recover_nodes(matrices, vectors, supports=supports)
    assert all(result.support_reused and result.converged for result in again)

    def theirs() -> int:
        return sum(
            reference.recover_with_cvxpy(A, b, 1e-5)[1] for A, b in zip(matrices, vectors, strict=True)
        )

    steps, iterations = sum(result.n_iter for result in results), theirs()
    cold, warm = (
        compare(
            f"recovery of a cell pair's 8 nodes, certified, {what}",
            functools.partial(recover_nodes, matrices, vectors, supports=given),
            theirs,
            bound,
            rounds=rounds,
            repeats=repeats,
            counted=f"{n_iter} steps / {iterations} iterations",
        )
        for what, given, n_iter, bound, repeats in (
            ("exact path", None, steps, 12, 3),
            ("last support holds", supports, 0, 100, 20),
        )
    )
    sizes = (500, 2000, 8000)
    many = [
        ([matrices[i % 8] for i in range(n)], [generator.normal(0, 0.3, 7) for _ in range(n)]) for n in sizes
    ]
    results = recover_nodes(*many[-1])
    assert all(result.converged for result in results)
    seconds = harness.interleaved([functools.partial(recover_nodes, *nodes) for nodes in many], 3)
    each = [1e6 * s / sizes[-1] for s in seconds[-1]]
    median = statistics.median(each)
    batched = Row(
        "8,000 nodes in one call",
        median,
        harness.quartiles(each),
        80,
        median,
        unit="us a node",
        kind="at most",
        counted=f"{sum(result.n_iter for result in results):,} steps",
    )
    grows = harness.growth("seconds of the recovery in one call against nodes", sizes, seconds)
    return [cold, warm, batched, grows]


def memory(runs: int) -> list[Row]:
    peaks = measure_peaks(runs)

    def row(work: str, kind: str, bound: float) -> Row:
        of = {k: {what: [run[what] for run in peaks[k]] for what in ("peak", "step")} for k in peaks}
        ours, theirs = of[kind], of["reference"]
        ratio, spread = harness.ratio_of_medians(ours["peak"], theirs["peak"])
        (peak, step), (their_peak, their_step) = (
            (statistics.median(m["peak"]), statistics.median(m["step"])) for m in (ours, theirs)
        )
        above = f"above what was there before the step: {step:,.0f} / {their_step:,.0f} MiB"
        return Row(work, ratio, spread, bound, peak, their_peak, "MiB", "at most", above)

    return [
        row("peak memory of a two-stage step, 16 / 8 / 256", "ours", 1.0),
        row("the same, activation_checkpointing", "checkpointing", 0.5),
    ]


def growth(rounds: int) -> list[Row]:
    """Return the exponents with which a two-stage step's time grows with layers, channels and batch."""
    rows = []
    for name, values in {"layers": (4, 8, 16), "channels": (8, 16, 32), "batch": (16, 32, 64)}.items():
        calls = []
        for value in values:
            at = BASE | {name: value}
            search = make_search(at["channels"], at["layers"], random_codes(0))
            batches = (ours_of(random_batch(at["batch"], 32, i)) for i in range(2))
            calls.append(functools.partial(two_stage_step, search, *batches))
        others = ", ".join(f"{other} {size}" for other, size in BASE.items() if other != name)
        work = f"seconds of a two-stage step against {name} (at {others})"
        rows.append(harness.growth(work, values, harness.interleaved(calls, rounds)))
    return rows


WORKS: dict[str, Callable[[], Row | list[Row]]] = {
    "small": lambda: search_step(8, 5, 32, 2.5, 5),
    "medium": lambda: search_step(16, 8, 64, 3.0, 3),
    "dense": lambda: against_dense(8, 5, 32, 20.0, 3),
    "one_stage": lambda: search_step(8, 8, 32, 2.0, 5, one_stage=True),
    "validation": lambda: validation(16, 8, 64, 1.6, 7),
    "retraining": lambda: retraining(16, 8, 64, 1.8, 5),
    "augmentation": lambda: augmentation(256, 6.0, 15),
    "compile": lambda: compiled.retraining(8, 3, 32, 5),
    "decoding": lambda: large_pictures.decoding(512, 1.5, 5),
    "reading_memory": lambda: large_pictures.memory(128),
    "shards": shards.measure,
    "recovery": lambda: recovery(7),
    "memory": lambda: memory(3),
    "methods": lambda: methods.costs(3),
    "reduced": multiprocess.bytes_all_reduced,
    "ray": lambda: multiprocess.ray_against_torchrun(5),
    "growth": lambda: growth(3),
}


def main(
    arguments: Sequence[str] | None = None, works: Mapping[str, Callable[[], Row | list[Row]]] = WORKS
) -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--only", choices=works, help="measure only this work, and write no file without --json"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write this file instead of bench.json")
    options = parser.parse_args(arguments)
    path = Path("bench.json") if options.json is None and options.only is None else options.json
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows: list[Row] = []
    for name in works if options.only is None else [options.only]:
        done = works[name]()
        rows += [done] if isinstance(done, Row) else done
        print(f"{time.perf_counter() - start:5.0f} s: {name}", flush=True)
    harness.write(rows, time.perf_counter() - start, path)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
