"""A thousand nearly valid inputs for each loader, which refuses invalid ones with a one-line error."""

from collections.abc import Callable

import pytest

from tests.security.fuzz import BATCH, fuzz
from tests.security.loaders import LOADERS, Loader


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_invalid_inputs_give_one_line_errors_only(
    loader: Loader, record_property: Callable[[str, object], None]
) -> None:
    counts = fuzz(loader, 0)
    record_property("fuzz", f"{loader.name}: {counts}")  # for the end of the log, see conftest.py
    assert counts.inputs >= BATCH
    refused = counts.inputs - counts.accepted
    assert counts.accepted >= BATCH / 20
    assert refused - counts.malformed >= BATCH / 5, "too few inputs pass the first check"
    assert counts.slowest < 10
