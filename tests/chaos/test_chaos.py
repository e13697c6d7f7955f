"""Every fault hits every job at random moments; afterwards, results must be those of an undisturbed run.

`make chaos` runs all cases and writes the table in tests/README.md. `make test` hits one job with some of the faults,
each at one moment, and several of them one after another.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.checks import check_as_undisturbed, check_cluster_is_left, check_nothing_lives
from tests.chaos.faults import FAST, FAST_JOB, FAULTS
from tests.chaos.victims import JOBS, Case
from tests.in_process import istanas

WITHOUT_RAY = ("--workers", "0")
SEED = int(os.environ.get("ISTANAS_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
WHOLE = "ISTANAS_CHAOS_RESULTS" in os.environ
TIMES = 3 if WHOLE else 1
CASES = [
    pytest.param(
        names,
        job,
        id=f"{', '.join(names)}-{job}",
        # They have one undisturbed run in common.
        marks=pytest.mark.xdist_group(f"{job}-{FAULTS[names[0]].workers}"),
    )
    for names, jobs in (
        [((name,), fault.jobs) for name, fault in FAULTS.items()]
        if WHOLE
        else [(names, (FAST_JOB,)) for names in FAST]
    )
    for job in jobs
]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

Undisturbed = Callable[[str, Sequence[str]], Case]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> Undisturbed:
    """Runs a job without a fault, once for each combination of settings."""
    done: dict[tuple[str, ...], Case] = {}

    def run(job: str, settings: Sequence[str]) -> Case:
        key = (job, *settings)
        if key not in done:
            case = Case(JOBS[job], tmp_path_factory.mktemp("undisturbed"), random.Random(0), tuple(settings))
            shutil.copy(blank_database, case.folder / "mlflow.db")
            if job == FAST_JOB and settings == WITHOUT_RAY:
                istanas(case.folder, case.command)  # in this process, which saves the start of another one
            else:
                case.finish()
            done[key] = case
        return done[key]

    return run


def settings_of(names: Sequence[str], job: str) -> tuple[str, ...]:
    """Return the options of a job's command, which are the same for all of the faults."""

    def of(name: str) -> tuple[str, ...]:
        fault = FAULTS[name]
        workers = fault.sweep_workers if job == "sweep" else fault.workers
        return ("--workers", str(workers), *fault.settings(job))

    (settings,) = {of(name) for name in names}
    return settings


@pytest.fixture
def case_folder(tmp_path: Path, blank_database: Path) -> Iterator[Path]:
    shutil.copy(blank_database, tmp_path / "mlflow.db")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize(("names", "job"), CASES)
def test_a_job_with_faults_equals_an_undisturbed_one(
    names: tuple[str, ...], job: str, undisturbed: Undisturbed, case_folder: Path
) -> None:
    refused = {name: reason for name in names if (reason := FAULTS[name].needs()) is not None}
    faults = [FAULTS[name] for name in names if name not in refused]
    if not faults:
        pytest.skip(", ".join(refused.values()))
    settings = settings_of(names, job)
    reference = undisturbed(job, settings)
    print(f"ISTANAS_CHAOS_SEED={SEED}")
    draw = random.Random(f"{SEED}/{', '.join(names)}/{job}")
    case = Case(JOBS[job], case_folder, draw, settings)
    loss = ""
    start = time.monotonic()
    try:
        place = faults[0].place
        case.cluster = None if place is None else place(case_folder)
        moments = list(range(TIMES * len(faults), 0, -1))
        for number, fault in enumerate(faults):
            fault.strike(case, moments[TIMES * number : TIMES * (number + 1)])
        check_nothing_lives(case)
        check_cluster_is_left(case)
        check_as_undisturbed(case, reference)
    except BaseException:
        loss = traceback.format_exc()
        raise
    finally:
        print(*case.strikes, sep="\n")
        case.end_leftovers()
        if case.cluster is not None:
            case.cluster.close()
        report.note(", ".join(names), job, case, loss, seed=SEED, seconds=time.monotonic() - start)
    if refused:
        pytest.skip(f"passed without {refused}")
