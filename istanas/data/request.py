"""The arguments of `load_dataset`, as each data set's function receives them, and the names of a folder in errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from istanas.data.pool import Progress


class GivenFolder(NamedTuple):
    """How error messages name a picture folder, and the settings that belong to it.

    Args:
        field: The setting or argument that names the folder.
        change: The words before another folder in a remedy.
        allow_left_out: How a remedy writes that files may be left out.
        test_fraction: The setting or argument with the share of the test pictures.
        divides: The words before "CLASS/*" in the remedy for a folder without a test split.
    """

    field: str
    change: str
    allow_left_out: str = "--set data.allow_left_out=true"
    test_fraction: str = "data.test_fraction"
    divides: str = "let data.test_fraction choose them from"


DATA_ROOT = GivenFolder("data.root", "set data.root to")
"""The folder of a job."""


@dataclass(frozen=True)
class DatasetRequest:
    """The arguments of `load_dataset` with the defaults filled in. See that function for their meanings.

    A relative `root` refers to the working directory of the command. `address` replaces it if the data lie in a bucket.
    `given` is how error messages name a picture folder.
    """

    name: str
    root: Path | None
    download: bool
    cache_dir: Path
    image_size: int | None
    background: tuple[int, int, int]
    allow_left_out: bool
    progress: Progress | None
    checking: Progress | None
    test_fraction: float = 0.0
    address: str | None = None
    given: GivenFolder = DATA_ROOT
