"""Fuzzing of the loaders: `python -m tests.security.fuzz [INPUTS [LOADER...]]`, 100,000 for each (`make fuzz`).

Inputs come in batches of a thousand. Each batch has its own seed, which is printed if the batch fails.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

from istanas.errors import IstanasError
from tests.security.loaders import LOADERS, Loader, few_random_settings, scratch_folder

BATCH = 1_000


@dataclass
class Counts:
    """Outcomes of inputs.

    Args:
        inputs: Number of inputs.
        accepted: Inputs that were loaded.
        malformed: Inputs refused by the first check, of their format; the others were refused for their content.
        slowest: Seconds of the slowest input.
    """

    inputs: int = 0
    accepted: int = 0
    malformed: int = 0
    slowest: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.inputs + other.inputs,
            self.accepted + other.accepted,
            self.malformed + other.malformed,
            max(self.slowest, other.slowest),
        )

    def __str__(self) -> str:
        refused = self.inputs - self.accepted
        return (
            f"{self.inputs} inputs, {self.accepted} accepted, {refused} refused ({self.malformed} as malformed), "
            f"slowest {self.slowest:.2f} s"
        )


def fuzz(loader: Loader, number: int) -> Counts:
    """Run one batch, and raise every error of the loader except an `IstanasError` with a message.

    Args:
        loader: See `LOADERS`.
        number: The batch's number, which is its seed.
    """
    counts = Counts()

    @seed(number)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    # Our own seeded generator makes the input, since drawing its parts with Hypothesis takes ten times as long.
    @given(strategies.randoms(use_true_random=True).map(loader.make))
    def load(data: Any) -> None:
        begun = time.process_time()
        counts.inputs += 1
        try:
            loader.load(folder, data)
            counts.accepted += 1
        except IstanasError as error:
            lines = [line.replace(f"{folder}/", "") for line in str(error).splitlines()]
            if not lines or not all(lines):
                raise AssertionError(f"no words: {error!r}") from error
            counts.malformed += lines[0].startswith(loader.first_check)
        counts.slowest = max(counts.slowest, time.process_time() - begun)

    with scratch_folder() as folder, few_random_settings():
        load()
    return counts


def _batch(job: tuple[int, int]) -> tuple[int, Counts | str]:
    """Run a batch in this process, and return its error as text."""
    import traceback

    which, number = job
    try:
        return which, fuzz(LOADERS[which], number)
    except BaseException:
        return which, f"{LOADERS[which].name}: batch {number} failed\n{traceback.format_exc()}"


def main(inputs: int = 100_000, *names: str) -> int:
    """Fuzz the loaders with these names, or all of them, with a number of inputs each, and return the exit code."""
    start, failures = time.monotonic(), 0
    chosen = [which for which, loader in enumerate(LOADERS) if loader.name in names or not names]
    totals = {LOADERS[which].name: Counts() for which in chosen}
    jobs = [(which, number) for number in range(-(-inputs // BATCH)) for which in chosen]
    with multiprocessing.get_context("spawn").Pool(
        int(os.environ.get("JOBS", "2")), maxtasksperchild=50
    ) as pool:
        for which, outcome in pool.imap_unordered(_batch, jobs):
            if isinstance(outcome, str):
                failures += 1
                print(outcome, flush=True)
            else:
                totals[LOADERS[which].name] += outcome
    for name, counts in totals.items():
        print(f"fuzz: {name}: {counts}")
    print(f"{failures} batches failed, {time.monotonic() - start:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:]))
