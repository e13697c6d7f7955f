"""The registry of data sets: scikit-learn's digits (no download), torchvision's data sets, and picture folders."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from istanas.checks import check_dataset_arguments
from istanas.data.arrays import TORCHVISION, load_digits, load_torchvision
from istanas.data.cache import default_cache_dir
from istanas.data.folder_dataset import load_folder
from istanas.data.image_dataset import ImageDataset
from istanas.data.pool import Progress
from istanas.data.request import DatasetRequest
from istanas.errors import ConfigError

DATASETS: Mapping[str, Callable[[DatasetRequest], ImageDataset]] = {
    "digits": load_digits,
    **dict.fromkeys(TORCHVISION, load_torchvision),
    "folder": load_folder,
}
"""The function that loads each data set, by name."""


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    cache_dir: str | Path | None = None,
    image_size: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    allow_left_out: bool = False,
    progress: Progress | None = None,
    checking: Progress | None = None,
) -> ImageDataset:
    """Load a data set by its name.

    Args:
        name: A key of `DATASETS`.
        root: The picture folder, or the folder with torchvision's files (by default `cache_dir`/downloads).
        download: Whether to download torchvision's files if they are missing.
        cache_dir: Cache folder; by default `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`.
        image_size: Side in pixels to which the pictures are scaled. Pictures of up to 64 pixels are kept in memory;
            larger ones (folders only) are decoded for each batch. By default, small pictures keep their size and large
            ones are scaled to 224.
        background: (red, green, blue) in 0..255, over which transparent pictures of a folder are composited.
        allow_left_out: Whether more than 1 % of the files of a class of a folder may be ignored, because they lie in
            sub-folders or have an unsupported suffix.
        progress: Called with (pictures decoded, pictures in total) while a folder is decoded.
        checking: Called with (pictures checked, pictures in total) while the headers of a folder are read.

    Returns:
        The data set, with the pictures on the CPU.

    Raises:
        ConfigError: If the name is unknown or the size is impossible.
        DataError: If pictures are missing or broken.

    Example:
        >>> digits = load_dataset("digits")
        >>> len(digits.train), len(digits.test), digits.num_classes
        (1438, 359, 10)
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        raise ConfigError(
            f"{name!r} is not a data set" + (f" (did you mean {near[0]!r}?)" if near else ""),
            field="data.name",
            remedy=f"choose one of {', '.join(DATASETS)}",
        )
    check_dataset_arguments(name, has_root=root is not None, image_size=image_size)
    request = DatasetRequest(
        name=name,
        root=None if root is None else Path(root).expanduser(),
        download=download,
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
        image_size=image_size,
        background=background,
        allow_left_out=allow_left_out,
        progress=progress,
        checking=checking,
    )
    return DATASETS[name](request)
