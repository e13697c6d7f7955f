"""`make chaos`: every fault on every job at three moments; then the table of the results in tests/README.md.

The arguments are pytest's. With a selection (`-k EXPRESSION`, `--lf`), the other cases keep their last results.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.report import replace_table, table
from tests.chaos.victims import JOBS

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    """Run the tests, write the table, and print where the results are."""
    results = Path("chaos-results").resolve()
    results.mkdir(exist_ok=True)
    if not any(word.startswith(("-k", "--lf")) or "::" in word for word in sys.argv):
        for old in results.iterdir():
            old.unlink()
    seed = os.environ.get("ISTANAS_CHAOS_SEED", str(random.SystemRandom().randrange(10**6)))
    suite = ["pytest", "-q", "-m", "slow", "tests/chaos", "--dist", "loadgroup"]
    done = subprocess.run(
        [sys.executable, "-m", *suite, *sys.argv[1:]],
        env={**os.environ, "ISTANAS_CHAOS_RESULTS": str(results), "ISTANAS_CHAOS_SEED": seed},
    )
    if any(results.glob("*.json")):
        replace_table(README, table(results, list(FAULTS), list(JOBS)))
    print(f"results of each case: {results}; table: {README}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
