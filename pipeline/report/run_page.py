"""`report.html`: everything about one finished run on a page of its own, made from its run directory alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from istanas.space import CELLS, Genotype, state_name
from pipeline.base.files import atomic_write
from pipeline.base.text import count, duration, percent
from pipeline.report.html import (
    BLUE,
    GREEN,
    ORANGE,
    add_axes,
    chart,
    chart_svg,
    data_uri,
    epoch_axis,
    figure,
    inline_svg,
    render,
)
from pipeline.report.terminal import validation_note
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import (
    BEST_FOLDER,
    CELLS_FOLDER,
    CONFIG_FILE,
    FREEZING_FIGURES,
    GENOTYPE_FILE,
    PLOTS_FOLDER,
    REPORT_PAGE,
    SWEEP_PAGE,
    TRAJECTORY_PAGE,
)
from pipeline.runs.outcome import ORIGIN_TAG
from pipeline.runs.record import MetricsLine, RunRecord

_KINDS = {"search": "search", "retrain": "retraining", "sweep": "sweep"}
_SPLITS = {"train": (BLUE, "-"), "valid": (ORANGE, "--"), "test": (GREEN, "-.")}
Rows = list[tuple[str, str]]


def write_report(run: RunDir, record: RunRecord | None = None) -> None:
    """Write the page of a finished run into its directory.

    Args:
        run: its directory; nothing else is read.
        record: of the run, if it is not yet written down as finished.

    Raises:
        CheckpointError: if files of the run are broken.
    """
    record = run.read() if record is None else record
    atomic_write(run.path / REPORT_PAGE, render("report.html", **_contents(run, record)))


def _contents(run: RunDir, record: RunRecord) -> dict[str, Any]:
    result, genotype = record.result, Genotype.from_dict(record.result["genotype"])
    environment = run.environment()
    method = record.method.replace("_", "-")
    what = f"{method} search" if record.kind == "search" else _KINDS[record.kind]
    of = f" of {Path(record.parent).name}" if record.parent is not None else ""
    if ORIGIN_TAG in record.tags:
        of = f", genotype from {record.tags[ORIGIN_TAG]}"
    freezing = run.path / FREEZING_FIGURES[0]
    return {
        "title": record.name,
        "subtitle": f"{what[0].upper()}{what[1:]} on {record.data_label}{of}, ended {_date(record.ended_ms)}",
        "links": [
            (file, text)
            for file, text in (
                (TRAJECTORY_PAGE, "the search, epoch by epoch"),
                (SWEEP_PAGE, "interactive figures"),
            )
            if (run.path / file).is_file()
        ],
        "validation": validation_note(record.kind, record.method) if "valid_top1" in result else "",
        "tiles": list(_tiles(record, genotype, len(run.metrics()))),
        "cells": [(cell, _cell(run.path, cell, genotype)) for cell in CELLS],
        "digest": genotype.digest()[:12],
        "genotype": str(genotype),
        "curves": _curves(run.metrics(), record.kind),
        "freezing": _svg(freezing, "freezing", "Distances of the nodes' codes over the epochs of the search")
        if freezing.is_file()
        else None,
        "frozen": sorted(result.get("frozen", []), key=lambda f: (f["cell"], f["node"])),
        "pictures": record.pictures,
        "settings": _settings(record),
        "configuration": (run.path / CONFIG_FILE).read_text(),
        "environment": _environment(environment),
        "command": environment.get("command", "not known"),
        "footer": f"{run.path.name}, begun {_date(record.started_ms)}",
        "best": [],
        "trials": None,
        "plots": [],
        **(_sweep_contents(run.path, record) if record.kind == "sweep" else {}),
    }


def _tiles(record: RunRecord, genotype: Genotype, epochs: int) -> Iterator[tuple[str, str]]:
    """The figures that stand at the top, the most important first."""
    result, sweep = record.result, record.kind == "sweep"
    if sweep:
        yield "best trial", str(result["best_trial"])
    for key, name in (
        ("test_top1", "test top-1"),
        ("test_top5", "test top-5"),
        ("retrained_top1", "top-1 after retraining"),
        ("valid_top1", "top-1 in search" if sweep else "validation top-1"),
        ("valid_top5", "validation top-5"),
    ):
        if key in result:
            yield name, percent(result[key])
    yield "parameters", figure(result["params"])
    yield "multiply-adds", figure(result["macs"])
    yield "skip connections", percent(genotype.skip_ratio())
    if sweep:
        ended = f"{result['complete']} done, {result['pruned']} stopped, {result['failed']} failed"
        yield "trials", ended
        if "kendall_tau" in result:
            tau = result["kendall_tau"]
            yield "Kendall's tau", "not defined" if tau is None else f"{tau:.2f}"
    if "search_epochs" in result:
        yield "epochs of search", figure(result["search_epochs"])
        yield "epochs of training", figure(result["train_epochs"])
        yield "rejected as too large", figure(result["rejected"])
    else:
        yield "epochs", figure(result.get("epochs", epochs))
    yield "time", duration(result["seconds"])


def _cell(folder: Path, cell: str, genotype: Genotype) -> Markup:
    nodes = (
        ", ".join(f"{op} from {state_name(state)}" for op, state in node) for node in genotype.picks(cell)
    )
    label = f"{cell} cell: " + "; ".join(f"node {i}: {node}" for i, node in enumerate(nodes))
    return _svg(folder / CELLS_FOLDER / f"{cell}.svg", cell, label)


def _svg(file: Path, name: str, label: str) -> Markup:
    return inline_svg(file.read_text(encoding="utf-8"), name, label)


def _curves(lines: Sequence[MetricsLine], kind: str) -> Markup | None:
    """Loss, top-1 and top-5 of all splits that were measured; of a sweep, the best so far."""
    if not lines:
        return None
    steps = [line.step for line in lines]
    panels, label = [("loss", "loss"), ("top1", "top-1, %")], "Loss and top-1 over the epochs"
    if kind == "sweep":
        panels, label = [("sweep/best_top1", "best top-1 so far, %")], "Best top-1 over the trials"
    elif any(f"{split}/top5" in line.metrics for line in lines for split in _SPLITS):
        panels, label = [*panels, ("top5", "top-5, %")], "Loss, top-1 and top-5 over the epochs"
    with chart(9.6, 3.2, left=0.07, right=0.99, top=0.9, bottom=0.15, wspace=0.16) as page:
        for place, (metric, title) in enumerate(panels, start=1):
            axes = add_axes(page, 1, len(panels), place, title)
            axes.set_xlabel("trials done" if kind == "sweep" else "epoch")
            names = {"": metric} if kind == "sweep" else {split: f"{split}/{metric}" for split in _SPLITS}
            for split, name in names.items():
                points = [(line.step, line.metrics[name]) for line in lines if name in line.metrics]
                if points:
                    colour, style = _SPLITS.get(split, (BLUE, "-"))
                    x, y = zip(*points, strict=True)
                    scale = 1 if metric == "loss" else 100
                    marker = "o" if len(x) <= 30 else ""
                    axes.plot(
                        x, [scale * v for v in y], style, color=colour, marker=marker, ms=3.5, label=split
                    )
            epoch_axis(axes, steps[0], steps[-1])
            if kind != "sweep":
                axes.legend(loc="upper right" if metric == "loss" else "lower right")
        return chart_svg(page, "curves", label)


def _settings(record: RunRecord) -> list[tuple[str, Rows]]:
    """The settings that decide the result, by section; a sweep's space stands with its best."""
    sections: dict[str, Rows] = {}
    for key, value in record.params.items():
        if key.startswith("sweep.space."):
            continue
        section, _, name = key.rpartition(".")
        sections.setdefault(section or "run", []).append(
            (name, figure(value).replace(",", ", ") if isinstance(value, str) else figure(value))
        )
    return list(sections.items())


def _environment(found: dict[str, Any]) -> Rows:
    if not found:
        return [("environment", "not recorded")]
    git = found["git"]
    commit = "not a checkout" if git is None else git["commit"] + (", with changes" if git["dirty"] else "")
    rows = [
        ("istanas", found["istanas"]),
        ("git commit", commit),
        ("Python", found["python"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items())),
        ("system", found["platform"]),
        ("processor", f"{found['cpu']}, {count(found['cores'], 'core')}"),
        ("memory", f"{found['memory_gib']:,} GiB"),
        ("GPUs", ", ".join(found["gpus"]) or "none"),
    ]
    if found["earlier"]:
        rows.append(
            ("begun elsewhere", f"{count(len(found['earlier']), 'environment')} before, in environment.json")
        )
    return rows


def _sweep_contents(folder: Path, record: RunRecord) -> dict[str, Any]:
    from pipeline.report.trials import page_table, read_table

    spaces = {
        key.removeprefix("sweep.space."): value
        for key, value in record.params.items()
        if key.startswith("sweep.space.")
    }
    best = folder / BEST_FOLDER
    return {
        "best": [
            (key, figure(record.result["settings"][key]) if key in record.result["settings"] else "", space)
            for key, space in spaces.items()
        ],
        "retrain_best": shlex.join(
            [
                "istanas",
                "retrain",
                "--genotype",
                f"{best}/{GENOTYPE_FILE}",
                "--config",
                f"{best}/{CONFIG_FILE}",
            ]
        ),
        "trials": page_table(folder, read_table(folder)),
        "plots": [
            (file.stem.replace("_", " "), data_uri(file.read_bytes()))
            for file in sorted((folder / PLOTS_FOLDER).glob("*.png"))
        ],
    }


def _date(ms: int | None) -> str:
    return "" if ms is None else f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
