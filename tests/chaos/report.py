"""The table in tests/README.md: what struck, how often, what was lost; `make chaos` writes it, from its own runs.

Each case leaves a file, which its next run replaces: a part of the suite, run again, changes its part of the table.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pandas as pd

from pipeline.config.workers import usable_cores
from tests.chaos.victims import Case

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def note(fault: str, job: str, case: Case, loss: str, *, seed: int, seconds: float) -> None:
    """Keep what became of a case, if anybody wants to know; of a loss also what was said.

    Args:
        fault: its name.
        job: its name.
        case: at its end.
        loss: what is wrong; empty: nothing.
        seed: of the moments.
        seconds: that it took.
    """
    folder = os.environ.get("ISTANAS_CHAOS_RESULTS")
    if folder is None:
        return
    outcome = {
        "fault": fault,
        "job": job,
        "moments": case.strikes,
        "starts": len(case.sittings),
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
    """Markdown: what was run, and a row a fault.

    Args:
        folder: where `note` has written.
        faults: in the order of the rows.
        jobs: in the order in which a row names them.
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
        f"`make chaos`, {days}: {len(cases)} cases, {cases['seconds'].sum() / 60:.0f} minutes of them all together, on "
        f"{usable_cores()} cores ({platform.system()}, Python {platform.python_version()}); seeds: {seeds}."
    )
    return "\n".join([caption, "", *rows])


def replace_table(readme: Path, text: str) -> None:
    """Put the text between the marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
