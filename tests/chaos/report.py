"""The table in tests/README.md: what struck, how often, what was lost; `make chaos` writes it, from its own runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from tests.chaos.victims import Case

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def note(fault: str, job: str, case: Case, loss: str, seed: int) -> None:
    """Keep what became of a case, if anybody wants to know; of a loss also what was said.

    Args:
        fault: its name.
        job: its name.
        case: at its end.
        loss: what is wrong; empty: nothing.
        seed: of the moments.
    """
    folder = os.environ.get("ISTANAS_CHAOS_RESULTS")
    if folder is None:
        return
    line = {
        "fault": fault,
        "job": job,
        "moments": case.strikes,
        "runs": len(case.sittings),
        "lost": bool(loss),
        "seed": seed,
    }
    with open(Path(folder) / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if loss:
        text = "\n\n".join([f"ISTANAS_CHAOS_SEED={seed}", *case.strikes, *case.told(), loss])
        (Path(folder) / f"{fault}-{job}.log".replace(" ", "_")).write_text(text)


def table(folder: Path, faults: list[str]) -> str:
    """Markdown: a row a fault.

    Args:
        folder: where `note` has written.
        faults: in the order of the rows.
    """
    lines = [
        json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()
    ]
    frame = pd.DataFrame(lines)
    rows = ["| fault | jobs | moments | starts of the command | losses |", "|---|---|---:|---:|---:|"]
    for fault in faults:
        cases = frame[frame["fault"] == fault]
        if cases.empty:
            continue
        moments = int(cases["moments"].map(len).sum())
        jobs = ", ".join(cases["job"])
        rows.append(
            f"| {fault} | {jobs} | {moments} | {int(cases['runs'].sum())} | {int(cases['lost'].sum())} |"
        )
    return "\n".join(rows)


def replace_table(readme: Path, text: str) -> None:
    """Put the text between the marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
