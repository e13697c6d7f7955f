"""Every fault hits every job at random moments; afterwards, results must be those of an undisturbed run.

`make chaos` runs all cases and writes the table in tests/README.md; `make test` runs some faults once, on one job each.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.checks import check_as_undisturbed, check_cluster_is_left, check_nothing_lives
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.victims import JOBS, Case, Job

SEED = int(os.environ.get("ISTANAS_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
WHOLE = "ISTANAS_CHAOS_RESULTS" in os.environ
TIMES = 3 if WHOLE else 1
CASES = [
    pytest.param(
        fault,
        job,
        id=f"{fault.name}-{job}",
        marks=pytest.mark.xdist_group(f"{job}-{fault.workers}"),  # They have one undisturbed run in common.
    )
    for fault in FAULTS.values()
    for job in fault.jobs
    if WHOLE or fault.fast == job
]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

Undisturbed = Callable[[Fault, Job], Case]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> Undisturbed:
    """Runs a job without a fault, once for each combination of settings."""
    done: dict[tuple[str, ...], Case] = {}

    def run(fault: Fault, job: Job) -> Case:
        settings = settings_of(fault, job)
        key = (job.name, *settings)
        if key not in done:
            case = Case(job, tmp_path_factory.mktemp("undisturbed"), random.Random(0), settings)
            shutil.copy(blank_database, case.folder / "mlflow.db")
            case.finish()
            done[key] = case
        return done[key]

    return run


def settings_of(fault: Fault, job: Job) -> tuple[str, ...]:
    workers = fault.sweep_workers if job.name == "sweep" else fault.workers
    return ("--workers", str(workers), *fault.settings(job.name))


@pytest.fixture
def case_folder(tmp_path: Path, blank_database: Path) -> Iterator[Path]:
    shutil.copy(blank_database, tmp_path / "mlflow.db")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize(("fault", "job"), CASES)
def test_a_job_with_faults_equals_an_undisturbed_one(
    fault: Fault, job: str, undisturbed: Undisturbed, case_folder: Path
) -> None:
    refused = fault.needs()
    if refused is not None:
        pytest.skip(refused)
    reference = undisturbed(fault, JOBS[job])
    print(f"ISTANAS_CHAOS_SEED={SEED}")
    draw = random.Random(f"{SEED}/{fault.name}/{job}")
    case = Case(JOBS[job], case_folder, draw, settings_of(fault, JOBS[job]))
    loss = ""
    start = time.monotonic()
    try:
        case.cluster = None if fault.place is None else fault.place(case_folder)
        fault.strike(case, TIMES)
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
        report.note(fault.name, job, case, loss, seed=SEED, seconds=time.monotonic() - start)
