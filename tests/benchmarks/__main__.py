"""`make bench`: what each kind of work costs against the reference, as a table and as bench.json."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from istanas.data import Augmentation, augment
from istanas.search.state import draw_matrices
from istanas.space import PUBLISHED, CellSpace
from istanas.sparse import recover_nodes
from pipeline.profiling import count_flops
from tests.benchmarks import harness, multiprocess, reference
from tests.benchmarks.harness import Row, compare
from tests.benchmarks.pairs import Pair, TargetPair, ours_of, random_batch

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SEEDS = (0, 1)  # of random active sets: a ratio is the median over them


class _Kernels(TorchDispatchMode):
    """Counts the calls of torch's operators, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def counted(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
    """FLOPs and kernels of a call, ours against the reference's."""
    figures = []
    for call in (ours, theirs):
        flops = count_flops(call)
        with _Kernels() as kernels:
            call()
        figures.append((flops, kernels.count))
    (a, k), (b, n) = figures
    return f"{a / 1e9:.2f} / {b / 1e9:.2f} GFLOP, {k:,} / {n:,} kernels"


def over_seeds(measure: Callable[[int], Row]) -> Row:
    """The (lower) median row over several random active sets, with the widest spread."""
    rows = sorted((measure(seed) for seed in SEEDS), key=lambda row: row.ratio)
    middle = rows[(len(rows) - 1) // 2]
    spread = min(r.spread[0] for r in rows), max(r.spread[1] for r in rows)
    return Row(**{**vars(middle), "spread": spread})


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
    return compare(
        f"augmentation of 32x32 pictures, {n} at a time (seconds a picture)",
        lambda: augment(pictures, ours, MEAN, STD, generator),
        lambda: torch.stack([transform(picture) for picture in pil]),
        bound,
        rounds=rounds,
        per=n,
    )


def recovery(rounds: int) -> list[Row]:
    space, generator = CellSpace(), np.random.default_rng(0)
    matrices = [A.numpy() for cell in draw_matrices(space, 7, "uniform", 0).values() for A in cell]
    vectors = [generator.normal(0, 0.3, 7) for _ in matrices]
    results = recover_nodes(matrices, vectors)
    assert all(result.converged for result in results)
    supports = [result.support for result in results]
    again = recover_nodes(matrices, vectors, supports=supports)
    assert all(result.support_reused and result.converged for result in again)

    def theirs() -> None:
        for A, b in zip(matrices, vectors, strict=True):
            reference.recover_with_cvxpy(A, b, 1e-5)

    cold, warm = (
        compare(
            f"recovery of a cell pair's 8 nodes, certified, {what}",
            functools.partial(recover_nodes, matrices, vectors, supports=given),
            theirs,
            bound,
            rounds=rounds,
            repeats=repeats,
        )
        for what, given, bound, repeats in (
            ("exact path", None, 12, 3),
            ("last support holds", supports, 100, 20),
        )
    )
    times = []
    for n in (1000, 8000):
        many = [matrices[i % 8] for i in range(n)], [generator.normal(0, 0.3, 7) for _ in range(n)]
        assert all(result.converged for result in recover_nodes(*many))
        times.append(statistics.median(harness.interleaved([functools.partial(recover_nodes, *many)], 3)[0]))
    each = 1e6 * times[1] / 8000
    grows = harness.exponent((1000, 8000), times)
    batched = Row(
        "8,000 nodes in one call",
        each,
        (each, each),
        80,
        each,
        80,
        "us a node",
        "at most",
        f"time ~ nodes^{grows:.2f}",
    )
    return [cold, warm, batched]


def memory() -> list[Row]:
    """Peak memory of a fresh process above what it has before its first step."""
    peaks = {
        kind: harness.peak_memory("tests.benchmarks.memory", kind)
        for kind in ("ours", "checkpointing", "reference")
    }
    (ours, saved, theirs) = (peaks[k]["step_mib"] for k in ("ours", "checkpointing", "reference"))

    def row(work: str, value: float, bound: float) -> Row:
        ratio = value / theirs
        return Row(work, ratio, (ratio, ratio), bound, value, theirs, "MiB", "at most")

    return [
        row("peak memory of a two-stage step, 16 / 8 / 64", ours, 1.0),
        row("the same, activation_checkpointing", saved, 0.5),
    ]


def growth(rounds: int) -> dict[str, str]:
    """Exponents of our two-stage step's time against layers, channels and batch."""
    sizes = {"layers": (4, 8, 16), "channels": (8, 16, 32), "batch": (16, 32, 64)}
    found = {}
    for name, values in sizes.items():
        calls = []
        for value in values:
            at = {"channels": 8, "layers": 5, "batch": 16} | {name: value}
            pair = Pair(at["channels"], at["layers"])
            batches = [ours_of(random_batch(at["batch"], 32, i)) for i in range(2)]
            calls.append(functools.partial(pair.our_step, *batches))
        seconds = [statistics.median(times) for times in harness.interleaved(calls, rounds)]
        found[f"step time against {name} {values}"] = (
            f"~ {name}^{harness.exponent(values, seconds):.2f} ({', '.join(f'{s:.3f}' for s in seconds)} s)"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", help="run the benchmarks whose name holds this")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    works: dict[str, Callable[[], Row | list[Row]]] = {
        "small": lambda: search_step(8, 5, 32, 2.5, 5),
        "medium": lambda: search_step(16, 8, 64, 3.0, 3),
        "dense": lambda: against_dense(8, 5, 32, 20.0, 3),
        "one_stage": lambda: search_step(8, 8, 32, 2.0, 5, one_stage=True),
        "validation": lambda: validation(16, 8, 64, 1.6, 7),
        "retraining": lambda: retraining(16, 8, 64, 1.8, 5),
        "augmentation": lambda: augmentation(256, 6.0, 15),
        "recovery": lambda: recovery(7),
        "memory": memory,
        "reduced": multiprocess.bytes_all_reduced,
        "ray": multiprocess.ray_against_torchrun,
    }
    rows: list[Row] = []
    for name, work in works.items():
        if options.only is None or options.only in name:
            done = work()
            rows += [done] if isinstance(done, Row) else done
            print(f"{time.perf_counter() - start:5.0f} s: {name}", flush=True)
    notes: dict[str, Any] = growth(3) if options.only is None or options.only in "growth" else {}
    notes["seconds in all"] = round(time.perf_counter() - start)
    harness.write(rows, notes, options.json)


if __name__ == "__main__":
    main()
