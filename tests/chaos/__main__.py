"""`make chaos`: every fault on every job, three moments each; then the table in tests/README.md, from what happened.

Arguments are pytest's; with those that choose (`-k EXPRESSION`, `--lf`) some cases are run again, and the others keep
their results.
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
    """Run the tests, say where the words of what was lost are, write the table."""
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
    print(f"what became of each case: {results}; the table: {README}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
