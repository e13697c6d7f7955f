"""The table of faults, jobs and losses in tests/README.md, which `make chaos` writes.

Each case writes a file, which its next run replaces, so that repeating some cases changes their part of the table.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pandas as pd

from pipeline.config.threads import usable_cores
from tests.chaos.victims import Case

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def note(fault: str, job: str, case: Case, loss: str, *, seed: int, seconds: float) -> None:
    """Write the outcome of a case to ISTANAS_CHAOS_RESULTS, if it is set, and the output of a case with a loss.

    Args:
        fault: The fault's name.
        job: The job's name.
        case: The case, which has ended.
        loss: The error that was found; empty: none.
        seed: The seed of the moments.
        seconds: The duration of the case.
    """
    folder = os.environ.get("ISTANAS_CHAOS_RESULTS")
    if folder is None:
        return
    outcome = {
        "fault": fault,
        "job": job,
        "moments": case.strikes,
        "starts": len(case.attempts),
        "lost": bool(loss),
        "seed": seed,
        "seconds": seconds,
        "day": time.strftime("%Y-%m-%d"),
    }
    file = Path(folder) / f"{fault}, {job}.json"
    file.write_text(json.dumps(outcome, indent=1))
    words = file.with_suffix(".log")
    words.unlink(missing_ok=True)
    if loss:
        words.write_text("\n\n".join([f"ISTANAS_CHAOS_SEED={seed}", *case.strikes, *case.told(), loss]))


def table(folder: Path, faults: list[str], jobs: list[str]) -> str:
    """Return the table in Markdown: a caption and one row for each fault.

    Args:
        folder: The folder with the outcomes that `note` wrote.
        faults: The faults in the order of the rows.
        jobs: The jobs in the order in which a row names them.
    """
    cases = pd.DataFrame([json.loads(file.read_text()) for file in folder.glob("*.json")])
    rows = ["| fault | jobs | moments | starts of the command | losses |", "|---|---|---:|---:|---:|"]
    for fault in faults:
        of_it = cases[cases["fault"] == fault]
        if of_it.empty:
            continue
        struck = ", ".join(sorted(of_it["job"], key=jobs.index))
        moments = int(of_it["moments"].map(len).sum())
        rows.append(
            f"| {fault} | {struck} | {moments} | {int(of_it['starts'].sum())} | {int(of_it['lost'].sum())} |"
        )
    days = " to ".join(sorted({cases["day"].min(), cases["day"].max()}))
    seeds = ", ".join(str(seed) for seed in sorted(set(cases["seed"])))
    caption = (
        f"`make chaos`, {days}: {len(cases)} cases with {cases['seconds'].sum() / 60:.0f} minutes in total, on "
        f"{usable_cores()} cores ({platform.system()}, Python {platform.python_version()}); seeds: {seeds}."
    )
    return "\n".join([caption, "", *rows])


def replace_table(readme: Path, text: str) -> None:
    """Replace the text between the marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
