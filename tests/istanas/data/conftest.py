"""Fixtures of the tests of data sets."""

from pathlib import Path

import pytest

from istanas.data import (
    ImageDataset,
    load_dataset,
)
from tests.istanas.data.picture_files import Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_from(root: Path, **options: object) -> ImageDataset:
        return load_dataset("folder", root=root, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_from
