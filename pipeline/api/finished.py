"""A finished run as a Python object: its result, genotype, configuration, epochs and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from istanas.errors import CheckpointError, ConfigError
from istanas.space import Genotype
from pipeline.config.schema import Config
from pipeline.jobs.settings import find_run, keywords_of, load_config
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import read_genotype
from pipeline.runs.layout import CONFIG_FILE, GENOTYPE_FILE
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.outcome import outcome
from pipeline.tracking.references import load_of_run

if TYPE_CHECKING:
    import pandas as pd

    from istanas.data import Preprocessing
    from istanas.nets import TargetNetwork
    from pipeline.runs.network_files import NetworkCard

Result = TypeVar("Result", bound=Mapping[str, object])


@dataclass(frozen=True, repr=False)
class FinishedRun(Generic[Result]):
    """A finished run.

    The properties read the files of the run directory when they are used.

    Args:
        path: The run directory; for a run in a storage, its local copy.
        result: The figures of the job, as `--json` prints them, see `pipeline.jobs.results`.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> trained.class_names[:3], trained.preprocessing.shape  # doctest: +SKIP
        (('0', '1', '2'), (1, 8, 8))
        >>> trained  # doctest: +SKIP
        FinishedRun(name='digits-retrain', kind='retrain', path='runs/digits-retrain-...', test_top1=...)
    """

    path: Path
    result: Result

    def __repr__(self) -> str:
        """Return the name, the kind, the directory and the accuracy of the run; the result has more."""
        try:
            record = RunDir(self.path).read()
            shown = {"name": repr(record.name), "kind": repr(record.kind)}
        except CheckpointError:  # the directory may have been deleted, and the object must still be printed
            shown = {}
        shown["path"] = repr(self.reference)
        keys = ("test_top1", "retrained_top1", "valid_top1")
        accuracies = {key: value for key in keys if isinstance(value := self.result.get(key), float)}
        shown |= {key: f"{value:.4f}" for key, value in list(accuracies.items())[:1]}
        return f"FinishedRun({', '.join(f'{name}={text}' for name, text in shown.items())})"

    @property
    def reference(self) -> str:
        """The path as commands take it: relative if it is below the working directory; its address in a storage."""
        here = Path.cwd()
        return bucket.shown(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    @property
    def kind(self) -> str:
        """The kind of the run, such as "search", "retrain" or "sweep"."""
        return RunDir(self.path).read().kind

    @property
    def genotype(self) -> Genotype:
        """The genotype that the run has found or trained.

        Raises:
            ConfigError: A run of this kind has no genotype.
        """
        if not (self.path / GENOTYPE_FILE).exists():
            raise ConfigError(
                f"a {self.kind} has no genotype", field=f"run {self.path}", remedy="load a search"
            )
        return read_genotype(self.path / GENOTYPE_FILE)

    @property
    def config(self) -> Config:
        """The whole configuration of the run, with all defaults."""
        return load_of_run(self.path / CONFIG_FILE, RunDir(self.path))

    @property
    def history(self) -> pd.DataFrame:
        """The metrics of the run, with a row for each epoch (`epoch`, from 1) and a column for each metric.

        A metric that an epoch has not measured is NaN. Accuracies are fractions in [0, 1].
        """
        import pandas as pd

        rows = [{"epoch": line.step, **line.metrics} for line in RunDir(self.path).metrics()]
        # An epoch may have several lines. `first` takes each metric from the first line that has it.
        return (
            pd.DataFrame(rows, columns=None if rows else ["epoch"]).groupby("epoch", as_index=False).first()
        )

    @property
    def parent(self) -> FinishedRun[Mapping[str, object]] | None:
        """The run that this one belongs to, such as the search of a retraining; None if there is none."""
        above = RunDir(self.path).read().parent
        return None if above is None else load(above)

    @cached_property
    def network(self) -> TargetNetwork:
        """The trained network in eval mode, on the CPU. It takes (N, C, H, W), see `preprocessing`.

        Raises:
            ConfigError: The run has trained no network.
        """
        from pipeline.runs.network_files import load_network

        self._check_network()
        return load_network(self.path)[0]

    @property
    def card(self) -> NetworkCard:
        """The description of the trained network: its sizes, its class names and its preprocessing.

        Raises:
            ConfigError: The run has trained no network.
        """
        from pipeline.runs.network_files import read_card

        self._check_network()
        return read_card(self.path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.card.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes an input: `preprocessing.normalized(preprocessing.read(FILE)[None])`."""
        return self.card.preprocessing

    def _check_network(self) -> None:
        from pipeline.jobs.export import check_network

        run = RunDir(self.path)
        check_network(run, run.read())


def load(
    run: str | Path, config: str | Path | None = None, **settings: object
) -> FinishedRun[Mapping[str, object]]:
    """Load a finished run.

    Args:
        run: A run directory or its address, an MLflow run id, or a unique name.
        config: A configuration file that names the folder of runs and the MLflow store in which an id or a name is
            looked up; the default is `runs` in the working directory.
        settings: Single keys of the configuration, such as `**{"runtime.runs_dir": "elsewhere"}`.

    Raises:
        ConfigError: No run or more than one run matches, or the run is not finished.

    Example:
        >>> import pipeline
        >>> trained = pipeline.run("digits.yaml", quiet=True, seed=1)  # doctest: +SKIP
        >>> pipeline.load(trained.path).genotype == trained.genotype  # doctest: +SKIP
        True
        >>> load("no-such-run")
        Traceback (most recent call last):
        istanas.errors.ConfigError: ...
    """
    chosen, _ = load_config(None if config is None else str(config), keywords_of(settings))
    found = find_run(str(run), chosen)
    record = found.read()
    if record.status != "FINISHED":
        raise ConfigError(
            f"is {outcome(record.status, record.tags)}",
            field=f"run {bucket.shown(found.path)}",
            remedy="wait until it has finished, or resume it with the call that started it",
        )
    link = read_link(found)
    ids = {"run_dir": bucket.shown(found.path), "mlflow_run_id": None if link is None else link.run_id}
    return FinishedRun(found.path.absolute(), ids | record.result)
