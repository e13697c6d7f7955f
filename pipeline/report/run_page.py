"""`report.html`: the page of one finished run, written from its run directory only."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from istanas.space import Genotype, kind_title
from pipeline.base.files import atomic_write
from pipeline.base.text import count, duration, percent
from pipeline.config.plugins import plugin_options
from pipeline.report.columns import SPACE_PREFIX
from pipeline.report.effects_section import effects_contents
from pipeline.report.evaluation_section import evaluation_contents
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
    job_title,
    kind_label,
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
from pipeline.runs.record import MetricsLine, RunRecord
from pipeline.runs.tags import Tag

_SPLITS = {"train": (BLUE, "-"), "valid": (ORANGE, "--"), "test": (GREEN, "-.")}
Rows = list[tuple[str, str]]


def write_report(run: RunDir, record: RunRecord | None = None) -> None:
    """Write the page of a finished run into its directory.

    Args:
        run: The run directory; nothing else is read.
        record: The record of the run, if the one in the directory is not final yet.

    Raises:
        CheckpointError: If files of the run are damaged.
    """
    record = run.read() if record is None else record
    atomic_write(run.path / REPORT_PAGE, render("report.html", **_contents(run, record)))


def _contents(run: RunDir, record: RunRecord) -> dict[str, Any]:
    result, genotype = record.result, Genotype.from_dict(record.result["genotype"])
    environment = run.environment()
    freezing = run.path / FREEZING_FIGURES[0]
    return {
        "title": record.name,
        "subtitle": f"{job_title(record)}{_origin(record)}, ended {_date(record.ended_ms)}",
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
        "cells": [(kind_title(cell), _cell(run.path, cell, genotype)) for cell in genotype.kinds],
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
        "footer": f"Run directory {run.path.name}, started {_date(record.started_ms)}",
        "evaluation": evaluation_contents(run.path),
        "effects": effects_contents(run, record) if "effects" in result else None,
        "best": [],
        "trials": None,
        "plots": [],
        **(_sweep_contents(run.path, record) if record.kind == "sweep" else {}),
    }


def _origin(record: RunRecord) -> str:
    """Return the parent run of a trial, or the source of a retraining's genotype."""
    if Tag.ORIGIN in record.tags:
        return f", genotype from {record.tags[Tag.ORIGIN]}"
    if record.parent is None:
        return ""
    return f", {'trial of' if record.kind == 'search' else 'genotype from'} {Path(record.parent).name}"


def _tiles(record: RunRecord, genotype: Genotype, epochs: int) -> Iterator[tuple[str, str]]:
    """Yield name and value of the results at the top of the page, the most important first."""
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
        yield "trials", f"{result['complete']} done, {result['pruned']} stopped, {result['failed']} failed"
        if "kendall_tau" in result and "valid_top1" in result:
            tau = result["kendall_tau"]
            yield "Kendall's tau", "not defined" if tau is None else f"{tau:.2f}"
    if "search_epochs" in result:
        yield "epochs of search", figure(result["search_epochs"])
        yield "epochs of training", figure(result["train_epochs"])
        yield "rejected by limits", figure(result["rejected"])
    else:
        yield "epochs of all searches" if sweep else "epochs", figure(result.get("epochs", epochs))
    yield "time of all searches" if sweep else "time", duration(result["seconds"])


def _cell(folder: Path, cell: str, genotype: Genotype) -> Markup:
    return _svg(folder / CELLS_FOLDER / f"{cell}.svg", cell, kind_label(genotype, cell))


def _svg(file: Path, name: str, label: str) -> Markup:
    return inline_svg(file.read_text(encoding="utf-8"), name, label)


def _curves(lines: Sequence[MetricsLine], kind: str) -> Markup | None:
    """Draw loss, top-1 and top-5 of all measured splits or, for a sweep, the best top-1 so far."""
    measured = {name for line in lines for name in line.metrics}
    if not lines or (kind != "sweep" and measured.isdisjoint(f"{split}/loss" for split in _SPLITS)):
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
            axes.set_xlabel("ended trials" if kind == "sweep" else "epoch")
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
    """Return the settings that determine the result, by section. The space of a sweep has a section of its own."""
    sections: dict[str, Rows] = {}
    for key, value in record.params.items():
        if key.startswith(SPACE_PREFIX):
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
    commit = (
        "not a checkout"
        if git is None
        else git["commit"] + (", with uncommitted changes" if git["dirty"] else "")
    )
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
    if "plugins" in found:
        rows.append(
            ("plugins", ", ".join(f"{each['name']} {each['sha256'][:12]}" for each in found["plugins"]))
        )
    if found["earlier"]:
        rows.append(("earlier environments", f"{len(found['earlier'])}, in environment.json"))
    return rows


def _sweep_contents(folder: Path, record: RunRecord) -> dict[str, Any]:
    from pipeline.report.trials import page_table, read_table

    space = {
        key.removeprefix(SPACE_PREFIX): values
        for key, values in record.params.items()
        if key.startswith(SPACE_PREFIX)
    }
    best, settings = folder / BEST_FOLDER, record.result["settings"]
    return {
        "best": [
            (key, figure(settings[key]) if key in settings else "", values) for key, values in space.items()
        ],
        "retrain_best": shlex.join(
            [
                "istanas",
                "retrain",
                "--genotype",
                f"{best}/{GENOTYPE_FILE}",
                "--config",
                f"{best}/{CONFIG_FILE}",
                *plugin_options(),
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
