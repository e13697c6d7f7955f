"""The jobs as functions: search, retrain, run, sweep, export, predict and evaluate.

Each function does what the command of its name does, in the calling process or on Ray's workers. `search`, `retrain`,
`run` and `sweep` return the finished run, `export` its files, `predict` the predictions, and `evaluate` the figures. A
function can be called in a script, in a notebook, where the progress is a bar below the cell, and inside a running
event loop. KeyboardInterrupt leaves a run that the same call resumes.

The arguments that several functions have:

- `config`: a configuration file, or the name of one that the package contains; None for "digits_quickstart". For
  `export` and `evaluate`, None is the configuration of the run.
- `fresh`: whether to delete the run directory of the same configuration and start over. Without it, the job resumes an
  unfinished run and returns a finished one without any work.
- `quiet`: whether to write nothing.
- `plugins`: files of plugins, which register operations, spaces, methods or data sets.
- `settings`: single keys of the configuration, such as `seed=1` or `**{"search.epochs": 10}`.

Errors: a `ConfigError` names the field, the problem and the remedy; see `istanas.errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from istanas.errors import DataError
from pipeline.api.finished import FinishedRun
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.plugins import load_plugins
from pipeline.jobs.context import JobContext, say_to
from pipeline.jobs.results import OneStageResult, RetrainResult, RunResult, SearchResult, SweepResult
from pipeline.jobs.settings import keywords_of, load_config, load_for_genotype, run_and_config
from pipeline.runs import bucket

if TYPE_CHECKING:
    from pipeline.jobs.evaluate import EvaluateResult
    from pipeline.jobs.export import Precision
    from pipeline.jobs.predict import BrokenFile, Prediction

File = str | Path


def search(
    config: File | None = None,
    *,
    fresh: bool = False,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> FinishedRun[SearchResult | OneStageResult]:
    """Search for an architecture, as `istanas search` does.

    Args:
        config, fresh, quiet, plugins, settings: See `pipeline.api.jobs`.

    Returns:
        The search, with its genotype; of a one-stage search, also the trained network.

    Example:
        >>> import pipeline
        >>> found = pipeline.search("digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> found.genotype.kinds, len(found.history) == found.config.search.epochs  # doctest: +SKIP
        (('normal', 'reduce'), True)
    """
    from pipeline.jobs.search import run_search

    with _context(config, fresh, quiet, plugins, settings) as context:
        return _finished(run_search(context))


def retrain(
    genotype: str | Path | FinishedRun[Any],
    config: File | None = None,
    *,
    fresh: bool = False,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> FinishedRun[RetrainResult]:
    """Train the network of a genotype from scratch and test it, as `istanas retrain` does.

    Args:
        genotype: What `istanas retrain --genotype` takes, or the search that found it.
        config: A configuration file. Without it, the settings of data, space and tracking are those of the search.
        fresh, quiet, plugins, settings: See `pipeline.api.jobs`.

    Example:
        >>> import pipeline
        >>> found = pipeline.search("digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> trained = pipeline.retrain(found, "digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> trained.genotype == found.genotype, 0 < trained.result["test_top1"] <= 1  # doctest: +SKIP
        (True, True)
    """
    from pipeline.jobs.retrain import run_retrain

    load_plugins([str(file) for file in plugins])
    reference = _reference(genotype)
    console = _console(quiet)
    cells, parent, chosen, name = load_for_genotype(reference, console, _text(config), keywords_of(settings))
    origin = Path(reference).name if Path(reference).is_file() else reference
    with Runtime(chosen.runtime) as runtime:
        context = JobContext(chosen, name, console, runtime, fresh, parent)
        return _finished(run_retrain(context, cells, origin=origin))


def run(
    config: File | None = None,
    *,
    fresh: bool = False,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> FinishedRun[RunResult | OneStageResult]:
    """Search, then retrain the result, as `istanas run` does; a one-stage search is exported instead.

    Args:
        config, fresh, quiet, plugins, settings: See `pipeline.api.jobs`.

    Returns:
        The run with the trained network: the retraining, whose `parent` is the search, or the one-stage search.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> trained.kind, trained.parent.kind, trained.parent.history.columns[0]  # doctest: +SKIP
        ('retrain', 'search', 'epoch')
    """
    from pipeline.jobs.run import run_whole

    with _context(config, fresh, quiet, plugins, settings) as context:
        result = run_whole(context)
    return _finished(result, str(result.get("retrain_run_dir", result["run_dir"])))


def sweep(
    config: File | None = None,
    *,
    fresh: bool = False,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> FinishedRun[SweepResult]:
    """Run many searches with different settings and keep the best, as `istanas sweep` does.

    Args:
        config, fresh, quiet, plugins, settings: See `pipeline.api.jobs`.

    Returns:
        The sweep, with the genotype of its best trial.

    Example:
        >>> import pipeline
        >>> swept = pipeline.sweep("sweep_digits")  # doctest: +SKIP
        >>> swept.result["settings"]  # doctest: +SKIP
        {'search.lr': 0.05}
    """
    from pipeline.sweeps.job import run_sweep

    with _context(config, fresh, quiet, plugins, settings) as context:
        return _finished(run_sweep(context))


def export(
    run: str | Path | FinishedRun[Any],
    config: File | None = None,
    *,
    precision: Precision = "fp32",
    tolerance: float | None = None,
    again: bool = False,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> dict[str, Path]:
    """Write the trained network of a run in every format, as `istanas export` does.

    Args:
        run: A finished retraining or one-stage search, or what `load` takes.
        config: A configuration file. Without it, the settings are those of the run.
        precision: "int8" also writes an ONNX file with 8-bit integers; its figures are in int8.json beside it, see
            `pipeline.jobs.quantization.Int8Report`.
        tolerance: By how many percentage points the top-1 accuracy of that file may be lower; only with "int8". None
            for the default of the command.
        again: Whether to repeat an earlier export.
        quiet, plugins, settings: See `pipeline.api.jobs`.

    Returns:
        For each format ("safetensors", "program", "onnx" and perhaps "int8"), its file.

    Raises:
        ConfigError: The tolerance is negative, or given without "int8".
        IstanasError: The accuracy has fallen by more than the tolerance. An earlier export is kept.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", seed=1, quiet=True)  # doctest: +SKIP
        >>> pipeline.export(trained, quiet=True)["onnx"].name  # doctest: +SKIP
        'model.onnx'
    """
    from pipeline.jobs.export import run_export

    load_plugins([str(file) for file in plugins])
    found, chosen = run_and_config(_reference(run), _text(config), keywords_of(settings))
    result = run_export(
        chosen, found.path, console=_console(quiet), again=again, precision=precision, tolerance=tolerance
    )
    return {name: found.path.absolute() / exported["file"] for name, exported in result["exports"].items()}


def predict(
    network: str | Path | FinishedRun[Any],
    *files: str | Path,
    config: File | None = None,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> list[Prediction]:
    """Classify pictures with a trained network. Unlike `istanas predict`, it fails if any file cannot be used.

    Args:
        network: A finished retraining or one-stage search, or what `istanas predict` takes: a run, an export folder, a
            file model.safetensors, model.onnx or model.int8.onnx, or a registered model, models:/NAME@ALIAS.
        files: Picture files, and folders whose pictures are classified.
        config: A configuration file that names the folder of runs and the MLflow store.
        plugins, settings: See `pipeline.api.jobs`.

    Returns:
        For each picture its file, class and probability, and the five most probable classes ("top5").

    Raises:
        DataError: A file is not a picture that the network takes.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", seed=1, quiet=True)  # doctest: +SKIP
        >>> pipeline.predict(trained, "picture.png")[0]["class"] in "0123456789"  # doctest: +SKIP
        True
    """
    from pipeline.jobs import predict as job

    load_plugins([str(file) for file in plugins])
    chosen, _ = load_config(_text(config), keywords_of(settings))
    name, predictor = job.find_predictor(_reference(network), chosen)
    result = job.predict(
        name,
        predictor,
        list(job.picture_files([str(Path(file).expanduser()) for file in files])),
        complain=lambda line: None,
    )
    _refuse_broken(result["broken"])
    return result["predictions"]


def evaluate(
    network: str | Path | FinishedRun[Any],
    data: File | None = None,
    *,
    out: File = "evaluation",
    predictions: bool = False,
    config: File | None = None,
    quiet: bool = False,
    plugins: Sequence[File] = (),
    **settings: Any,
) -> EvaluateResult:
    """Measure a trained network, as `istanas evaluate` does. Unlike the command, it fails if a file cannot be used.

    Args:
        network: A finished retraining or one-stage search; with `data`, also any network that `predict` takes.
        data: A folder with one sub-folder of pictures for each class. None for the test split of the run, whose
            directory, report and MLflow run receive the result.
        out: The folder of the files about `data`.
        predictions: Whether the result has "predictions": for each picture, `picture`, `true`, `predicted`,
            `probability` and `true_probability`.
        config, quiet, plugins, settings: See `pipeline.api.jobs`.

    Returns:
        The figures ("evaluation"), the files that were written, and "predictions" if `predictions` is true.

    Raises:
        DataError: A picture cannot be used, or the pictures are missing.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", seed=1, quiet=True)  # doctest: +SKIP
        >>> figures = pipeline.evaluate(trained, quiet=True)["evaluation"]  # doctest: +SKIP
        >>> figures["pictures"], figures["top1"]["estimate"] == trained.result["test_top1"]  # doctest: +SKIP
        (359, True)
    """
    from pipeline.jobs import evaluate as job
    from pipeline.jobs.predict import find_predictor

    load_plugins([str(file) for file in plugins])
    reference, file, given = _reference(network), _text(config), keywords_of(settings)
    if data is None:
        run, chosen = run_and_config(reference, file, given)
        return job.evaluate_run(run.path, chosen, _console(quiet), with_predictions=predictions)
    folder = Path(out).expanduser()
    chosen, _ = load_config(file, given)
    job.check_folder(folder)
    name, predictor = find_predictor(reference, chosen)
    result = job.evaluate_folder(
        name,
        predictor,
        Path(data).expanduser(),
        folder,
        complain=lambda line: None,
        say=say_to(_console(quiet)),
        with_predictions=predictions,
    )
    _refuse_broken(result["broken"])
    return result


def _refuse_broken(broken: Sequence[BrokenFile]) -> None:
    """Raise an error that names the first file that cannot be used, if there is one."""
    if broken:
        raise DataError(broken[0]["reason"], field="files", remedy="correct this file or leave it out")


def _reference(run: str | Path | FinishedRun[Any]) -> str:
    return run.reference if isinstance(run, FinishedRun) else str(run)


def _finished(result: Any, run_dir: str | None = None) -> FinishedRun[Any]:
    return FinishedRun(bucket.local(run_dir or result["run_dir"]).absolute(), result)


def _text(file: File | None) -> str | None:
    return None if file is None else str(file)


def _console(quiet: bool) -> Console:
    return Console(markup=False, quiet=quiet)


@contextmanager
def _context(
    config: File | None, fresh: bool, quiet: bool, plugins: Sequence[File], settings: dict[str, Any]
) -> Iterator[JobContext]:
    """Yield the context of a job. At the end, shut down Ray if the job has started it."""
    load_plugins([str(file) for file in plugins])
    chosen, name = load_config(_text(config), keywords_of(settings))
    with Runtime(chosen.runtime) as runtime:
        yield JobContext(chosen, name, _console(quiet), runtime, fresh)
