"""`make chaos`: every fault on every job, three moments each; then the table in tests/README.md, from what happened."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

from pipeline.resources import usable_cores
from tests.chaos.faults import FAULTS
from tests.chaos.report import replace_table, table

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    """Run the tests, say where the words of what was lost are, write the table."""
    results = Path("chaos-results").resolve()
    results.mkdir(exist_ok=True)
    for old in results.iterdir():
        old.unlink()
    seed = os.environ.get("ISTANAS_CHAOS_SEED", str(random.SystemRandom().randrange(10**6)))
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "slow",
            "tests/chaos",
            "--dist",
            "loadgroup",
            *sys.argv[1:],
        ],
        env={**os.environ, "ISTANAS_CHAOS_RESULTS": str(results), "ISTANAS_CHAOS_SEED": seed},
    )
    minutes = (time.monotonic() - start) / 60
    caption = (
        f"`make chaos`, {time.strftime('%Y-%m-%d')}: seed {seed}, {minutes:.0f} minutes on {usable_cores()} cores "
        f"({platform.system()}, Python {platform.python_version()})."
    )
    if any(results.glob("*.jsonl")):
        replace_table(README, f"{caption}\n\n{table(results, list(FAULTS))}")
    print(f"what became of each case: {results}; the table: {README}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
