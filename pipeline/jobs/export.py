"""The export job: writes the trained network of a finished run in every format to the run's folder `export`.

With the precision "int8", the folder also has a quantised ONNX file, see `pipeline.jobs.quantization`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from rich.console import Console

from istanas.errors import ConfigError
from istanas.methods import trains_target
from istanas.space import Genotype
from pipeline.base.extras import check_extra
from pipeline.config.choices import TOLERANCE_POINTS
from pipeline.config.schema import Config
from pipeline.jobs.closing import tracker_of
from pipeline.jobs.context import say_to
from pipeline.jobs.export_formats import (
    EXPORTED_FILES,
    FORMAT_FILES,
    ExportedFormat,
    export_formats,
)
from pipeline.jobs.lifecycle import load_data
from pipeline.jobs.quantization import (
    EXPORT_METRICS,
    Int8Plan,
    Int8Report,
    describe_int8,
    int8_metrics,
    is_accurate,
    plan_int8,
    quantize_export,
    read_report,
)
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import EXPORT_FOLDER, INT8_FILE, INT8_REPORT, WEIGHTS_FILE
from pipeline.runs.network_files import load_network, read_card
from pipeline.runs.outcome import outcome
from pipeline.runs.record import MetricsLine, RunRecord
from pipeline.training.pictures import check_same_pictures, data_digest, datasets_used

Precision = Literal["fp32", "int8"]
EXPORT_ARTIFACTS = tuple(f"{EXPORT_FOLDER}/{file}" for file in EXPORTED_FILES)
INT8_ARTIFACTS = tuple(f"{EXPORT_FOLDER}/{file}" for file in (INT8_FILE, INT8_REPORT))


class ExportResult(TypedDict):
    """Result of `export_network` and `run_export`; file paths are relative to the run directory."""

    run_dir: str
    mlflow_run_id: NotRequired[str | None]  # only from `run_export`
    digest: str
    exports: dict[str, ExportedFormat]
    int8: NotRequired[Int8Report]  # with the precision "int8"


def run_export(
    config: Config,
    run_dir: str | Path,
    *,
    console: Console,
    again: bool = False,
    precision: Precision = "fp32",
    tolerance: float | None = None,
) -> ExportResult:
    """Export the network of a run and deliver the files and their figures to MLflow.

    Args:
        config: The whole configuration; its section `tracking` says where the run is mirrored.
        run_dir: Run directory of a finished retraining or one-stage search, or its address.
        console: Where lines for the user are written.
        again: Whether to repeat an earlier export.
        precision: "int8" also writes a quantised ONNX file.
        tolerance: By how many percentage points its top-1 accuracy may be lower; None for `TOLERANCE_POINTS`.

    Returns:
        The result of `export_network`.

    Raises:
        ConfigError: The run has no trained network, or the tolerance is not 0 to 100, or given without "int8".
        DataError, CheckpointError: The pictures that a quantisation requires are missing or have changed.
        IstanasError: A package is missing, or the quantised network is not accurate enough. An earlier export is kept.
    """
    if tolerance is not None and precision != "int8":
        raise ConfigError(
            f'{tolerance} has no effect, because only the precision "int8" changes the accuracy',
            field="tolerance",
            remedy='leave it out, or set precision="int8"',
        )
    points = TOLERANCE_POINTS if tolerance is None else tolerance
    if not 0 <= points <= 100:  # also true for NaN
        raise ConfigError(
            f"{tolerance} is not a loss of accuracy in percentage points",
            field="tolerance",
            remedy="use 0 to 100",
        )
    say = say_to(console)
    with bucket.acquired(RunDir(bucket.local(str(run_dir))), say) as run:
        return _export(config, run, console, again, precision, points)


def _export(
    config: Config, run: RunDir, console: Console, again: bool, precision: Precision, tolerance: float
) -> ExportResult:
    say, is_int8 = say_to(console), precision == "int8"
    before = None if again else exported_before(run)
    report = read_report(run.path / EXPORT_FOLDER) if is_int8 else None
    if before is None or (is_int8 and (report is None or not is_accurate(report, tolerance))):
        plan = _int8_plan(config, run, tolerance, console) if is_int8 else None
        result = export_network(run, say=say, int8=plan)
    else:
        say(f"export: already done, see {bucket.shown(run.path / EXPORT_FOLDER)}")
        digest = Genotype.from_json(read_card(run.path).genotype).digest()
        result = ExportResult(run_dir=bucket.shown(run.path), digest=digest, exports=before)
        if report is not None:
            result["exports"]["int8"] = _int8_format(report)
            result["int8"] = report
    tracker = tracker_of(run, config)
    if not tracker.deliver():
        say(f"not in MLflow yet: deliver it with istanas sync {bucket.shown(run.path)}")
    run.push()
    return {**result, "mlflow_run_id": tracker.run_id}


def _int8_plan(config: Config, run: RunDir, tolerance: float, console: Console) -> Int8Plan:
    """Load the pictures of a run, which must be those that it was trained on, and choose those of a quantisation."""
    record = run.read()
    check_network(run, record)
    check_extra("export", "--precision int8")
    dataset = load_data(config, console)
    used = datasets_used(config, dataset, record.kind)
    check_same_pictures(record, dataset, data_digest(config, dataset, record.kind), used)
    steps = read_card(run.path).preprocessing
    return plan_int8(config, dataset, record.kind, steps, record.data_label, tolerance)


def export_network(
    run: RunDir, *, say: Callable[[str], None] | None = None, int8: Int8Plan | None = None
) -> ExportResult:
    """Write the trained network of a run in every format to `RUN/export`, and compare each file with the network.

    The differences become metrics (`export/onnx_difference`, ...) of the last step, and the files become artifacts of
    the run, so that the next `MLflowTracker.deliver` sends both. An earlier export is replaced.

    Args:
        run: A finished retraining or one-stage search.
        say: Receives one line for each format.
        int8: The pictures and the tolerance of a quantisation; None for none.

    Returns:
        For each format ("safetensors", "program", "onnx" and perhaps "int8") its file, size and largest difference; the
        digest of the network's genotype; and the figures of the quantisation.

    Raises:
        ConfigError: The run is not finished, is a two-stage search, or is in use by another process.
        CheckpointError: The run does not exist, or its network is missing or broken.
        IstanasError: See `export_formats` and `pipeline.jobs.quantization.quantize_export`. An earlier export is kept.

    Example:
        >>> result = export_network(RunDir("runs/digits-retrain-0123abcd"), say=print)  # doctest: +SKIP
        safetensors: runs/digits-retrain-0123abcd/export/model.safetensors, 0.21 MB, largest difference 0
        program: runs/digits-retrain-0123abcd/export/model.pt2, 0.84 MB, largest difference 0
        onnx: runs/digits-retrain-0123abcd/export/model.onnx, 0.25 MB, largest difference 1.9e-06
        >>> result["exports"]["onnx"]["difference"]  # doctest: +SKIP
        1.9073486328125e-06
    """
    run.read()  # raises if there is no run; taking the lock would create a run directory
    with run.lock():
        record = run.read()
        check_network(run, record)
        net, _ = load_network(run.path)
        card = read_card(run.path)
        with replacing(run.path / EXPORT_FOLDER) as folder:
            report = export_formats(net, card, folder)
            quantized = None if int8 is None else quantize_export(folder, int8)
        exports: dict[str, ExportedFormat] = {
            name: {**exported, "file": f"{EXPORT_FOLDER}/{exported['file']}"}
            for name, exported in report.items()
        }
        if quantized is not None:
            exports["int8"] = _int8_format(quantized)
        _note_figures(run, exports, {} if quantized is None else int8_metrics(quantized))
        # Written last, so that the record lists the files only if the export is complete.
        others = [name for name in record.artifacts if name not in INT8_ARTIFACTS]
        files = EXPORT_ARTIFACTS if quantized is None else (*EXPORT_ARTIFACTS, *INT8_ARTIFACTS)
        run.write(dataclasses.replace(record, artifacts=tuple(dict.fromkeys((*others, *files)))))
    if say is not None:
        for line in describe_exports(run, exports):
            say(line)
        for line in () if quantized is None else describe_int8(quantized):
            say(line)
    digest = Genotype.from_json(card.genotype).digest()
    result = ExportResult(run_dir=bucket.shown(run.path), digest=digest, exports=exports)
    return result if quantized is None else {**result, "int8": quantized}


def _int8_format(report: Int8Report) -> ExportedFormat:
    return ExportedFormat(
        file=f"{EXPORT_FOLDER}/{INT8_FILE}", bytes=report["int8"]["bytes"], difference=report["difference"]
    )


def check_network(run: RunDir, record: RunRecord) -> None:
    """Check that a run has a trained network.

    Raises:
        ConfigError: It has none.
    """
    shown = bucket.shown(run.path)
    if record.kind == "search" and not trains_target(record.method):
        raise ConfigError(
            f"a {record.method.replace('_', '-')} search has no trained network",
            field=f"run {shown}",
            remedy=f"give its retraining, or retrain it first: istanas retrain --genotype {shown}",
        )
    if record.status != "FINISHED":
        raise ConfigError(
            f"is {outcome(record.status, record.tags)}, only finished runs have a trained network",
            field=f"run {shown}",
            remedy="wait until it has finished, or resume it with the command that started it",
        )


def describe_exports(run: RunDir, exports: Mapping[str, ExportedFormat]) -> list[str]:
    """Return one line for the user about each format.

    Example:
        >>> exported = ExportedFormat(file="export/model.onnx", bytes=250_000, difference=1e-6)
        >>> describe_exports(RunDir("r"), {"onnx": exported})
        ['onnx: r/export/model.onnx, 0.25 MB, largest difference 1e-06']
    """
    return [
        f"{name}: {bucket.shown(run.path / e['file'])}, {e['bytes'] / 1e6:.2f} MB, "
        f"largest difference {e['difference']:.2g}"
        for name, e in exports.items()
    ]


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends, and is deleted if the block fails.

    Only one process may use it at a time; leftovers of a killed process are removed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "export"
        >>> with replacing(folder) as new:
        ...     _ = (new / "file").write_text("whole")
        >>> [path.name for path in folder.iterdir()], len(list(folder.parent.iterdir()))
        (['file'], 1)
    """
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    _tidy(folder, new, old)
    try:
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)  # a folder cannot be renamed over one that contains files
        new.rename(folder)
    finally:
        _tidy(folder, new, old)


def _tidy(folder: Path, new: Path, old: Path) -> None:
    """Restore `folder` if a process was killed between the two renames, and delete the temporary folders."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def exported_before(run: RunDir) -> dict[str, ExportedFormat] | None:
    """Return the earlier result of `export_network` for the current weights; None if they were not exported."""
    folder, lines = run.path / EXPORT_FOLDER, run.metrics()
    files = [folder / file for file in EXPORTED_FILES] + [run.path / WEIGHTS_FILE]
    if not set(EXPORT_ARTIFACTS) <= set(run.read().artifacts) or not all(file.is_file() for file in files):
        return None
    if (folder / WEIGHTS_FILE).read_bytes() != (run.path / WEIGHTS_FILE).read_bytes():
        return None
    found: dict[str, ExportedFormat] = {}
    for name, file in FORMAT_FILES.items():
        difference = lines[-1].metrics.get(_metric(name)) if lines else None
        if difference is None:
            return None
        size = (folder / file).stat().st_size
        found[name] = {"file": f"{EXPORT_FOLDER}/{file}", "bytes": size, "difference": difference}
    return found


def _note_figures(run: RunDir, exports: Mapping[str, ExportedFormat], figures: Mapping[str, float]) -> None:
    """Replace the differences and figures of an earlier export in the metrics of the last step."""
    lines = run.metrics() or [MetricsLine(0, int(time.time() * 1000), {})]
    last = lines[-1]
    others = {name: value for name, value in last.metrics.items() if not name.startswith(EXPORT_METRICS)}
    differences = {_metric(name): exported["difference"] for name, exported in exports.items()}
    run.replace_metrics([*lines[:-1], last._replace(metrics={**others, **differences, **figures})])


def _metric(name: str) -> str:
    return f"{EXPORT_METRICS}{name}_difference"
