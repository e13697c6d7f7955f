"""Data types of a run directory: the record, the data sets that the run uses, and a line of metrics."""

import hashlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from istanas.data.registry import DATASETS
from pipeline.base.addresses import is_remote


def data_label(name: str, root: str | None) -> str:
    """Return the label of a data set: its name, or the last parts of the path that decides which pictures it has.

    A digest of the whole path distinguishes folders whose last parts are the same. A data set of a plugin that is not
    loaded here is labelled by its path, as if the plugin were loaded.

    Args:
        name: The setting `data.name`.
        root: The setting `data.root`.

    Example:
        >>> data_label("digits", None), data_label("folder", "/data/Pets/my cats")
        ('digits', 'pets-my-cats-be8e75')
    """
    entry = DATASETS.get(name)
    if root is None or (entry is not None and not entry.is_named_by_root):
        return name
    source = root if is_remote(root) else str(Path(root).expanduser().absolute())
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in Path(source).parts[-2:]]
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:6]
    return "-".join([*filter(None, parts), digest])


# Names of the parts of a data set in messages, by context.
_PART = {
    "training": "training part",
    "alphas": "alpha half",
    "hold-out": "hold-out part",
    "test": "test split",
}


@dataclass(frozen=True)
class DatasetUse:
    """Pictures that a run uses for one purpose.

    Args:
        name: Label of the data set, see `data_label`.
        context: The purpose: "training", "alphas", "hold-out" or "test".
        digest: Digest of the pictures and their labels (16 hexadecimal digits), the same on every machine.
        source: The folder or the package that contains the pictures.
        pictures, classes: Numbers of pictures and classes.
        shape: Shape of a picture as a network sees it, (C, H, W).
        missing: Names of the classes without a picture.
    """

    name: str
    context: str
    digest: str
    source: str
    pictures: int
    classes: int
    shape: tuple[int, ...]
    missing: tuple[str, ...] = ()

    def describe_missing(self) -> str | None:
        """Return a line about the classes without pictures, or None if there are none."""
        return describe_missing(self.context, self.missing, self.classes) if self.missing else None


def describe_missing(context: str, missing: Sequence[str], classes: int) -> str:
    """Return a line about the classes without pictures in a part of a data set.

    Args:
        context: The part, see `DatasetUse`.
        missing: Names of these classes.
        classes: Number of all classes.

    Example:
        >>> describe_missing("alphas", ["bee"], 3)
        'the alpha half has no picture of bee; accuracies on it cover 2 of 3 classes'
    """
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return (
        f"the {_PART[context]} has no picture of {names}; accuracies on it cover {classes - len(missing)} of "
        f"{classes} classes"
    )


@dataclass(frozen=True)
class RunRecord:
    """The record of a run (`run.json`). Times are in milliseconds since 1970, UTC.

    Args:
        name: Name of the run, without its hash.
        kind: "search", "retrain", "sweep", "benchmark", "rank", "versus" or "measurement".
        method: The search method.
        dataset: The setting `data.name`.
        key: Unique id, by which the MLflow run is found.
        params, tags, description: As MLflow shows them.
        parent: Run directory of the search of a retraining or of a measurement, of the sweep of a trial, or of the
            benchmark or comparison of a search.
        status: "RUNNING", "FINISHED", "FAILED" or "KILLED".
        started_ms, ended_ms: Start and end.
        artifacts: Files that are sent to MLflow, relative to the run directory.
        result: The figures that `--json` prints.
        datasets: The data that the run uses.
        data_digest: Digest of all pictures that the run may read; "" if it is unknown.
        pictures: Lines for the report about the pictures and how they are read.
    """

    name: str
    kind: str
    method: str
    dataset: str
    key: str
    params: dict[str, str | int | float | bool | None]
    tags: dict[str, str]
    description: str
    parent: str | None
    status: str
    started_ms: int
    ended_ms: int | None
    artifacts: tuple[str, ...]
    result: dict[str, Any]
    datasets: tuple[DatasetUse, ...] = ()
    data_digest: str = ""
    pictures: tuple[str, ...] = ()

    @property
    def data_label(self) -> str:
        """The label of the data set, see `data_label`."""
        root = self.params.get("data.root")
        if not isinstance(root, str):
            return self.dataset
        return data_label(self.dataset, self.datasets[0].source if self.datasets else root)

    def measured_on(self, metric: str) -> DatasetUse | None:
        """Return the data that a metric is measured on; None if there is none, or it is unknown.

        Args:
            metric: "train/...", "valid/..." (on the hold-out, or on the alpha half) or "test/...".
        """
        return next((use for c in contexts_of(metric) for use in self.datasets if use.context == c), None)


def contexts_of(metric: str) -> tuple[str, ...]:
    """Return the contexts that a metric may be measured on, in order of preference.

    Example:
        >>> contexts_of("valid/top1"), contexts_of("target/params")
        (('hold-out', 'alphas'), ())
    """
    by_split = {"train": ("training",), "valid": ("hold-out", "alphas"), "test": ("test",)}
    return by_split.get(metric.partition("/")[0], ())


class MetricsLine(NamedTuple):
    """The metrics of one step, and the time in ms since 1970 at which they were measured."""

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


def new_key() -> str:
    """Return a new unique id of a run (32 hexadecimal digits)."""
    return uuid.uuid4().hex
