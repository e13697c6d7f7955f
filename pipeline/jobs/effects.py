"""The table `effects.csv` of a search by measurements, and the figures of its result."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from istanas.effects import TOSS_UP, Budget, EffectsSummary, count_certain, supports_of
from istanas.search.measured import summary_of
from istanas.space import SearchSpace
from pipeline.base.files import atomic_write
from pipeline.jobs.results import EffectsResult
from pipeline.jobs.search_tables import measurement_of
from pipeline.runs.layout import EFFECTS_FILE
from pipeline.training.epoch_record import EpochRecord

EFFECTS_COLUMNS = (
    "candidate",
    "cell",
    "node",
    "state",
    "op",
    "mean",
    "low",
    "high",
    "probability",
    "kept",
    "lasso",
)


def write_effects(
    folder: Path,
    records: Iterable[EpochRecord],
    space: SearchSpace,
    seed: int,
    budget: Callable[[], Budget | None],
) -> EffectsResult | None:
    """Write the effects of the candidates into the run directory of a search, and return its figures.

    Args:
        folder: The run directory.
        records: All epochs of the search.
        space: The space of the search.
        seed: The seed of the search.
        budget: Returns the limits of the search, or `None`; called if there are measurements.

    Returns:
        The figures; `None`, and no file is written, if there are no effects: with another method, or with fewer than
        two measurements.
    """
    measurements = [m for record in records if (m := measurement_of(record, space)) is not None]
    summary = summary_of(space, measurements, seed, budget()) if measurements else None
    if summary is None:
        return None
    atomic_write(folder / EFFECTS_FILE, effects_table(space, summary))
    return effects_figures(space, summary, len(measurements))


def effects_figures(space: SearchSpace, summary: EffectsSummary, n_measurements: int) -> EffectsResult:
    """Return the figures of a search by measurements.

    Args:
        space: The space of the search.
        summary: What the measurements have shown.
        n_measurements: Their number.
    """
    return {
        "measurements": n_measurements,
        "predicted": summary.score[0],
        "deviation": summary.score[1],
        "choices": len(summary.choices),
        "certain": count_certain(summary.choices),
        "toss_ups": int((summary.choices < TOSS_UP).sum()),
        "choice_probabilities": [round(float(each), 6) for each in summary.choices],
        "probability_best": summary.probability_best,
        "expected_improvement": summary.improvement.expected,
        "lasso_gap": summary.gap,
        "next": [
            {
                "architecture": space.text(space.genotype(supports_of(space, kept))),
                "candidates": list(kept),
                "predicted": predicted,
                "deviation": deviation,
            }
            for kept, predicted, deviation in summary.following
        ],
    }


def effects_table(space: SearchSpace, summary: EffectsSummary) -> str:
    """Return the content of `effects.csv`: one row for each candidate, in the order of their numbers.

    Args:
        space: The space of the search.
        summary: What the measurements have shown.
    """
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(EFFECTS_COLUMNS)
    places = [(d.kind, d.index, state, op) for d in space.all_decisions() for op, state in d.candidates]
    for number, place in enumerate(places):
        low, high = summary.intervals[number]
        figures = (summary.mean[number], low, high, summary.kept[number])
        kept = number in summary.best
        shown = [f"{each:.6g}" for each in figures]
        rows.writerow((number, *place, *shown, kept, f"{summary.code[number]:.6g}"))
    return stream.getvalue()
