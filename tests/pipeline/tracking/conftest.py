"""Fixtures of the tests of the tracker."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """The store that the tests of this module share."""
    return f"sqlite:///{shutil.copy(blank_database, tmp_path_factory.mktemp('store'))}"
