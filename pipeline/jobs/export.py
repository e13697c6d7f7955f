"""The export job: writes the trained network of a finished run in every format to the run's folder `export`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from rich.console import Console

from istanas.errors import ConfigError
from istanas.methods import trains_target
from istanas.space import Genotype
from pipeline.config.schema import Config
from pipeline.jobs.closing import tracker_of
from pipeline.jobs.context import say_to
from pipeline.jobs.export_formats import EXPORTED_FILES, FORMAT_FILES, ExportedFormat, export_formats
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import EXPORT_FOLDER, WEIGHTS_FILE
from pipeline.runs.network_files import load_network, read_card
from pipeline.runs.outcome import outcome
from pipeline.runs.record import MetricsLine, RunRecord

EXPORT_ARTIFACTS = tuple(f"{EXPORT_FOLDER}/{file}" for file in EXPORTED_FILES)


class ExportResult(TypedDict):
    """Result of `export_network` and `run_export`; file paths are relative to the run directory."""

    run_dir: str
    mlflow_run_id: NotRequired[str | None]  # only from `run_export`
    digest: str
    exports: dict[str, ExportedFormat]


def run_export(config: Config, run_dir: str | Path, *, console: Console, again: bool = False) -> ExportResult:
    """Export the network of a run and deliver the files and their differences to MLflow.

    Args:
        config: The whole configuration; its section `tracking` says where the run is mirrored.
        run_dir: Run directory of a finished retraining or one-stage search, or its address.
        console: Where lines for the user are written.
        again: Whether to repeat an earlier export.

    Returns:
        The result of `export_network`.
    """
    say = say_to(console)
    with bucket.acquired(RunDir(bucket.local(str(run_dir))), say) as run:
        return _export(config, run, say, again)


def _export(config: Config, run: RunDir, say: Callable[[str], None], again: bool) -> ExportResult:
    before = None if again else exported_before(run)
    if before is None:
        result = export_network(run, say=say)
    else:
        say(f"export: already done, see {bucket.shown(run.path / EXPORT_FOLDER)}")
        digest = Genotype.from_json(read_card(run.path).genotype).digest()
        result = ExportResult(run_dir=bucket.shown(run.path), digest=digest, exports=before)
    tracker = tracker_of(run, config)
    if not tracker.deliver():
        say(f"not in MLflow yet: deliver it with istanas sync {bucket.shown(run.path)}")
    run.push()
    return {**result, "mlflow_run_id": tracker.run_id}


def export_network(run: RunDir, *, say: Callable[[str], None] | None = None) -> ExportResult:
    """Write the trained network of a run in every format to `RUN/export`, and compare each file with the network.

    The differences become metrics (`export/onnx_difference`, ...) of the last step, and the files become artifacts of
    the run, so that the next `MLflowTracker.deliver` sends both. An earlier export is replaced.

    Args:
        run: A finished retraining or one-stage search.
        say: Receives one line for each format.

    Returns:
        For each format ("safetensors", "program", "onnx") its file, size and largest difference; and the digest of the
        network's genotype.

    Raises:
        ConfigError: The run is not finished, is a two-stage search, or is in use by another process.
        CheckpointError: The run does not exist, or its network is missing or broken.
        IstanasError: See `export_formats`. An earlier export is kept.

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
        exports: dict[str, ExportedFormat] = {
            name: {**exported, "file": f"{EXPORT_FOLDER}/{exported['file']}"}
            for name, exported in report.items()
        }
        _note_differences(run, exports)
        # Written last, so that the record lists the files only if the export is complete.
        artifacts = tuple(dict.fromkeys((*record.artifacts, *EXPORT_ARTIFACTS)))
        run.write(dataclasses.replace(record, artifacts=artifacts))
    if say is not None:
        for line in describe_exports(run, exports):
            say(line)
    digest = Genotype.from_json(card.genotype).digest()
    return ExportResult(run_dir=bucket.shown(run.path), digest=digest, exports=exports)


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


def _note_differences(run: RunDir, exports: Mapping[str, ExportedFormat]) -> None:
    """Add the differences to the metrics of the last step; they replace those of an earlier export."""
    lines = run.metrics() or [MetricsLine(0, int(time.time() * 1000), {})]
    last = lines[-1]
    differences = {_metric(name): exported["difference"] for name, exported in exports.items()}
    run.replace_metrics([*lines[:-1], last._replace(metrics={**last.metrics, **differences})])


def _metric(name: str) -> str:
    return f"export/{name}_difference"
