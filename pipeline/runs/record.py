"""What a run directory records: the run, the pictures that it used, and a line of metrics."""

import hashlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OWN_PICTURES = "folder"  # the `data.name` of pictures that are no data set with a name


def data_label(name: str, root: str | None) -> str:
    """Return what a data set is called: its name, own pictures by the last parts of their folder.

    Two folders whose last parts are the same are told apart by a digest of the whole path.

    Args:
        name: `data.name`.
        root: `data.root`, the folder.

    Example:
        >>> data_label("digits", None), data_label("folder", "/data/Pets/my cats")
        ('digits', 'pets-my-cats-be8e75')
    """
    if name != OWN_PICTURES or root is None:
        return name
    source = str(Path(root).expanduser().absolute())
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in Path(source).parts[-2:]]
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:6]
    return "-".join([*filter(None, parts), digest])


# The parts of a data set, by context, in the words that people read.
_PART = {
    "training": "training part",
    "alphas": "alpha half",
    "hold-out": "hold-out part",
    "test": "test split",
}


@dataclass(frozen=True)
class DatasetUse:
    """Pictures that a run uses, and what for.

    Args:
        name: of the data set, see `data_label`.
        context: "training", "alphas", "hold-out" or "test".
        digest: of these pictures and their labels (16 hexadecimal digits), the same on every machine.
        source: where they come from: a folder, or who ships them.
        pictures, classes: how many.
        shape: (C, H, W) of a picture, as a network sees it.
        missing: names of the classes that have no picture among them.
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
        """One line about the classes without pictures; None if there are none."""
        return describe_missing(self.context, self.missing, self.classes) if self.missing else None


def describe_missing(context: str, missing: Sequence[str], classes: int) -> str:
    """One line about the classes of which a part of a data set has no picture.

    Args:
        context: the part, see `DatasetUse`.
        missing: names of these classes.
        classes: how many there are in all.

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
    """What one run is and where it stands (`run.json`). Times are milliseconds since the epoch, UTC.

    Args:
        data_digest: of all pictures that the run may read, whatever part of them it uses; "" if it is not known.
        pictures: lines for people: what pictures there are, how they are read, what is left out or missing.
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
        """What the data set is called, see the function of this name."""
        root = self.params.get("data.root")
        if not isinstance(root, str):
            return self.dataset
        return data_label(self.dataset, self.datasets[0].source if self.datasets else root)

    def measured_on(self, metric: str) -> DatasetUse | None:
        """The pictures that a metric is measured on; None if it is measured on none, or they are not known.

        Args:
            metric: "train/...", "valid/..." (on the hold-out, or on the alpha half) or "test/...".
        """
        return next((use for c in contexts_of(metric) for use in self.datasets if use.context == c), None)


def contexts_of(metric: str) -> tuple[str, ...]:
    """The contexts whose pictures a metric may be measured on, the first of them that there is.

    Example:
        >>> contexts_of("valid/top1"), contexts_of("target/params")
        (('hold-out', 'alphas'), ())
    """
    by_split = {"train": ("training",), "valid": ("hold-out", "alphas"), "test": ("test",)}
    return by_split.get(metric.partition("/")[0], ())


class MetricsLine(NamedTuple):
    """The metrics of one step, with the time (ms since the epoch) at which they were measured."""

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


def new_key() -> str:
    """A fresh unique id for a run (32 hexadecimal digits)."""
    return uuid.uuid4().hex
