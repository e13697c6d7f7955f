"""A thousand nearly right inputs for each loader: whatever is refused is refused in clean words."""

import pytest

from tests.security.fuzz import BATCH, fuzz
from tests.security.loaders import LOADERS, Loader


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_only_clean_errors_come_out(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    counts = fuzz(loader, 0)
    with capsys.disabled():  # the log of `make test` has the counts
        print(f"\nfuzz: {loader.name}: {counts}")
    assert counts.inputs >= BATCH
    refused = counts.inputs - counts.accepted
    assert counts.accepted >= BATCH / 20
    assert refused - counts.malformed >= BATCH / 5, "many get past the first check"
    assert counts.slowest < 10
