"""The arguments of `load_dataset`, as each data set's function receives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from istanas.data.pool import Progress


@dataclass(frozen=True)
class DatasetRequest:
    """The arguments of `load_dataset` with the defaults filled in. See that function for their meanings.

    A relative `root` refers to the working directory of the command. `address` replaces it if the data lie in a bucket.
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
