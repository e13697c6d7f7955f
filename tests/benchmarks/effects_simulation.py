"""Simulated searches on a table of true accuracies: what noisy measurements are worth to each policy.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.effects_simulation --table FILE --repeats 200 --out FILE.csv

The table has the columns `architecture` and `cifar10_test_accuracy`, and may be compressed (.gz). A measurement is the
normal score of the true accuracy plus Gaussian noise, so that Kendall's tau between measurement and truth is the one
given. Repetition k of every policy has the seed FIRST_SEED + k. The result is the rank, by true accuracy, of the
architecture that a policy calls the best: its mean, its median, and their standard errors (of the median by bootstrap).
No policy reads the table; it measures.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from istanas.effects import Architecture, architecture, normal_scores
from istanas.space import NasBench201Space, SearchSpace
from tests.benchmarks.effects_policies import POLICIES, Measure, Policy

AT = (40, 80, 120, 160)
TAUS = (0.46, 0.65)
FIELDS = (
    "tau",
    "policy",
    "measurements",
    "repeats",
    "first_seed",
    "mean_rank",
    "mean_se",
    "median_rank",
    "median_se",
)


@dataclass(frozen=True)
class Table:
    """Architectures with their true score and their true rank (1 is the best)."""

    space: SearchSpace
    score: dict[Architecture, float]
    rank: dict[Architecture, int]


def table_of(space: SearchSpace, architectures: Sequence[Architecture], accuracies: Sequence[float]) -> Table:
    """Return a table of accuracies."""
    loss = -np.asarray(accuracies, dtype=np.float64)
    ranks = rankdata(loss, method="min").astype(int)
    return Table(
        space,
        dict(zip(architectures, normal_scores(loss).tolist(), strict=True)),
        dict(zip(architectures, ranks.tolist(), strict=True)),
    )


def read_table(file: Path) -> Table:
    """Return the table in a CSV file."""
    space = NasBench201Space()
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as stream:
        rows = list(csv.DictReader(stream))
    kept = []
    for row in rows:
        genotype = space.parse(row["architecture"])
        assert genotype is not None, row
        kept.append(architecture(space, space.supports(genotype)))
    return table_of(space, kept, [float(row["cifar10_test_accuracy"]) for row in rows])


def noise_of(tau: float) -> float:
    """Return the standard deviation of the noise on a standard normal score at which Kendall's tau is this.

    For two normal variables with the correlation rho, tau = 2 / pi arcsin(rho), and rho = 1 / sqrt(1 + noise^2).
    """
    return float(np.sqrt(1.0 / np.sin(np.pi * tau / 2) ** 2 - 1.0))


def measurement(table: Table, tau: float, seed: int) -> Measure:
    """Return a function that measures an architecture; each call has its own noise."""
    rng, noise = np.random.Generator(np.random.PCG64([seed, 1])), noise_of(tau)
    return lambda kept: -(table.score[kept] + noise * float(rng.standard_normal()))


def ranks_of(
    table: Table, policy: Policy, tau: float, seeds: Sequence[int], at: Sequence[int] = AT
) -> np.ndarray:
    """Return the true rank of what a policy calls best, (seeds, at)."""
    found = [policy(table.space, measurement(table, tau, seed), at, seed) for seed in seeds]
    return np.array([[table.rank[kept] for kept in each] for each in found])


def summary(ranks: np.ndarray) -> dict[str, float]:
    """Return mean and median of ranks, with standard errors."""
    drawn = np.random.default_rng(0).choice(ranks, (2000, len(ranks)))
    return {
        "mean_rank": round(float(ranks.mean()), 1),
        "mean_se": round(float(ranks.std(ddof=1) / len(ranks) ** 0.5), 1),
        "median_rank": float(np.median(ranks)),
        "median_se": round(float(np.median(drawn, axis=1).std()), 1),
    }


def main() -> None:
    """Write one line for each tau, policy and number of measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=10_000)
    parser.add_argument("--tau", type=float, nargs="+", default=TAUS)
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    table, seeds = read_table(options.table), range(options.first_seed, options.first_seed + options.repeats)
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        for name in options.policy:
            for tau in options.tau:
                ranks = ranks_of(table, POLICIES[name], tau, seeds)
                for n, column in zip(AT, ranks.T, strict=True):
                    own = {"tau": tau, "policy": name, "measurements": n, "repeats": len(seeds)}
                    writer.writerow(own | {"first_seed": seeds[0]} | summary(column))
                stream.flush()
                print(f"tau {tau}, {name}: mean {ranks.mean(0).round(0).tolist()}", flush=True)


if __name__ == "__main__":
    main()
