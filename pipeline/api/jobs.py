"""The jobs as functions: search, retrain, run, sweep, export and predict.

Each function does what the command of its name does, in the calling process or on Ray's workers. `search`, `retrain`,
`run` and `sweep` return the finished run, `export` its files, and `predict` the predictions. A function can be called
in a script, in a notebook, where the progress is a bar below the cell, and inside a running event loop.
KeyboardInterrupt leaves a run that the same call resumes.

The arguments that several functions have:

- `config`: a configuration file, or the name of one that the package contains; None for "digits_quickstart".
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
from pipeline.jobs.context import JobContext
from pipeline.jobs.results import OneStageResult, RetrainResult, RunResult, SearchResult, SweepResult
from pipeline.jobs.settings import load_config, load_for_genotype, overrides_of
from pipeline.runs import bucket

if TYPE_CHECKING:
    from pipeline.jobs.predict import Prediction

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
        >>> found = search("digits.yaml", seed=1, **{"search.epochs": 10})  # doctest: +SKIP
        >>> found.genotype.digest()  # doctest: +SKIP
        'c0ffee...'
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
        >>> trained = retrain(search("digits.yaml"), "digits.yaml")  # doctest: +SKIP
        >>> trained.result["test_top1"]  # doctest: +SKIP
        0.9861
    """
    from pipeline.jobs.retrain import run_retrain

    load_plugins([str(file) for file in plugins])
    reference = genotype.reference if isinstance(genotype, FinishedRun) else str(genotype)
    console = _console(quiet)
    cells, parent, chosen, name = load_for_genotype(reference, console, _text(config), overrides_of(settings))
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
        >>> trained = run("digits.yaml", seed=1)  # doctest: +SKIP
        >>> trained.parent.history[["epoch", "valid/top1"]]  # doctest: +SKIP
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
        >>> swept = sweep("tune_configs/sweep_digits.yaml")  # doctest: +SKIP
        >>> swept.result["settings"]  # doctest: +SKIP
        {'search.lr': 0.05}
    """
    from pipeline.sweeps.job import run_sweep

    with _context(config, fresh, quiet, plugins, settings) as context:
        return _finished(run_sweep(context))


def export(
    run: str | Path | FinishedRun[Any], *, again: bool = False, quiet: bool = False
) -> dict[str, Path]:
    """Write the trained network of a run in every format, as `istanas export` does.

    Args:
        run: A finished retraining or one-stage search, or what `load` takes.
        again: Whether to repeat an earlier export.
        quiet: Whether to write nothing.

    Returns:
        For each format ("safetensors", "program", "onnx"), its file.

    Example:
        >>> export("runs/digits-retrain-0123abcd")["onnx"]  # doctest: +SKIP
        PosixPath('runs/digits-retrain-0123abcd/export/model.onnx')
    """
    from pipeline.api.finished import load
    from pipeline.jobs.export import run_export

    found = run if isinstance(run, FinishedRun) else load(run)
    result = run_export(found.config, found.reference, console=_console(quiet), again=again)
    return {name: found.path / exported["file"] for name, exported in result["exports"].items()}


def predict(
    network: str | Path | FinishedRun[Any], *files: str | Path, plugins: Sequence[File] = ()
) -> list[Prediction]:
    """Classify pictures with a trained network. Unlike `istanas predict`, it fails if any file cannot be used.

    Args:
        network: A finished retraining or one-stage search, or what `istanas predict` takes: a run, an export folder, a
            file model.safetensors or model.onnx, or a registered model, models:/NAME@ALIAS.
        files: Picture files, and folders whose pictures are classified.
        plugins: See `pipeline.api.jobs`.

    Returns:
        For each picture its file, class and probability, and the five most probable classes ("top5").

    Raises:
        DataError: A file is not a picture that the network takes.

    Example:
        >>> predict("runs/digits-retrain-0123abcd", "picture.png")[0]["class"]  # doctest: +SKIP
        '7'
    """
    from pipeline.jobs import predict as job

    load_plugins([str(file) for file in plugins])
    config, _ = load_config(None, ())
    reference = network.reference if isinstance(network, FinishedRun) else str(network)
    name, predictor = job.find_predictor(reference, config)
    result = job.predict(
        name,
        predictor,
        list(job.picture_files([str(Path(file).expanduser()) for file in files])),
        complain=lambda line: None,
    )
    if result["broken"]:
        first = result["broken"][0]
        raise DataError(first["reason"], field="files", remedy="correct this file or leave it out")
    return result["predictions"]


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
    chosen, name = load_config(_text(config), overrides_of(settings))
    with Runtime(chosen.runtime) as runtime:
        yield JobContext(chosen, name, _console(quiet), runtime, fresh)
