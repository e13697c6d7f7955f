"""Stratified splits and subsets: properties that hold for any labels."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from istanas.data import stratified_split, stratified_subset
from istanas.errors import ConfigError

LABELS = st.lists(st.integers(0, 6), max_size=120)
FRACTIONS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.9, 1.0]))
SEEDS = st.integers(0, 2**40)


def counts(labels: torch.Tensor) -> torch.Tensor:
    return torch.bincount(labels, minlength=7)


@given(LABELS, FRACTIONS, SEEDS)
def test_a_split_is_disjoint_complete_sorted_and_stratified(
    labels: list[int], fraction: float, seed: int
) -> None:
    rest, part = stratified_split(labels, fraction, seed)
    whole = torch.tensor(labels, dtype=torch.int64)
    assert rest.dtype == part.dtype == torch.int64
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(len(labels)))
    assert rest.tolist() == sorted(rest.tolist())
    assert part.tolist() == sorted(part.tolist())
    assert len(part) == round(fraction * len(labels))
    off = counts(whole[part]) - fraction * counts(whole)
    assert off.abs().max() < 1 + 1e-6


@given(LABELS, st.integers(1, 150), SEEDS)
def test_a_subset_has_the_size_asked_for_and_the_classes_in_proportion(
    labels: list[int], count: int, seed: int
) -> None:
    assume(labels)
    whole = torch.tensor(labels)
    subset = stratified_subset(labels, count, seed)
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert len(subset) == min(count, len(labels))
    off = counts(whole[subset]) - counts(whole) * (len(subset) / len(labels))
    assert off.abs().max() < 1 + 1e-6


def test_a_folder_sorted_by_class_is_split_evenly() -> None:
    labels = torch.arange(10).repeat_interleave(5000)
    rest, part = stratified_split(labels, 0.5, seed=0)
    assert torch.bincount(labels[rest]).tolist() == torch.bincount(labels[part]).tolist() == [2500] * 10
    # Not the first half of each class: about half of the part comes from there.
    assert 0.45 < (part % 5000 < 2500).float().mean() < 0.55


def test_the_seed_alone_decides_and_zero_is_a_seed() -> None:
    labels = torch.arange(4).repeat(50)
    splits = {seed: stratified_split(labels, 0.5, seed)[1] for seed in (0, 1, 2)}
    assert torch.equal(splits[0], stratified_split(labels, 0.5, 0)[1])
    assert not torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[1], splits[2])
    # A pinned draw: a change of the algorithm would silently change the splits of resumed runs.
    assert stratified_subset([0] * 6 + [1] * 4, 5, seed=0).tolist() == [2, 3, 5, 6, 7]


def test_every_picture_of_a_class_is_equally_likely() -> None:
    labels = [0] * 5 + [1] * 5
    drawn = torch.zeros(10)
    for seed in range(2000):
        drawn[stratified_subset(labels, 4, seed)] += 1
    torch.testing.assert_close(drawn / 2000, torch.full((10,), 0.4), atol=0.05, rtol=0)


def test_with_a_picture_a_class_no_class_always_goes_without() -> None:
    drawn = torch.zeros(10)
    for seed in range(200):
        drawn[stratified_split(list(range(10)), 0.5, seed)[1]] += 1
    assert drawn.min() > 60
    assert drawn.max() < 140


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"fraction: {fraction} .* \[0, 1\]"):
        stratified_split([0, 1], fraction, 0)


def test_a_subset_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"count: 0 .* use 1 or more"):
        stratified_subset([0, 1], 0, 0)
