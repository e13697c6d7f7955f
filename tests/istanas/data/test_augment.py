"""Batched augmentation against a literal one, picture by picture, that takes the same draws."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from istanas.data import Augmentation, augment, cutout, normalize, random_crop, random_flip
from istanas.errors import ConfigError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def pictures(n: int = 7, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=g, dtype=torch.uint8)


def literal(
    images: torch.Tensor, a: Augmentation, mean: tuple[float, ...], std: tuple[float, ...], seed: int
) -> np.ndarray:
    """Pad, crop, flip, standardise and cut out with one loop over the pictures, as the papers describe it."""
    g = torch.Generator().manual_seed(seed)
    n, channels, height, width = images.shape
    p = a.crop_padding
    offsets = torch.randint(2 * p + 1, (2, n), generator=g) if p else torch.zeros(2, n, dtype=torch.int64)
    flips = torch.randint(2, (n,), generator=g) if a.horizontal_flip else torch.zeros(n)
    rows = torch.randint(height, (n,), generator=g) if a.cutout else torch.zeros(n)
    columns = torch.randint(width, (n,), generator=g) if a.cutout else torch.zeros(n)
    out = np.empty(images.shape)
    for i in range(n):
        padded = np.zeros((channels, height + 2 * p, width + 2 * p))
        padded[:, p : p + height, p : p + width] = images[i].numpy()
        dy, dx = offsets[:, i].tolist()
        picture = padded[:, dy : dy + height, dx : dx + width]
        if flips[i]:
            picture = picture[:, :, ::-1]
        picture = (picture / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
        if a.cutout:
            top, left = int(rows[i]) - a.cutout // 2, int(columns[i]) - a.cutout // 2
            picture[:, max(top, 0) : max(top + a.cutout, 0), max(left, 0) : max(left + a.cutout, 0)] = 0
        out[i] = picture
    return out


@given(
    st.builds(
        Augmentation,
        crop_padding=st.integers(0, 5),
        horizontal_flip=st.booleans(),
        cutout=st.integers(0, 20),
    ),
    st.sampled_from([1, 3]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
def test_a_batch_equals_the_literal_pictures(
    a: Augmentation, channels: int, height: int, width: int, seed: int
) -> None:
    images = pictures(5, channels, height, width, seed)
    before = images.clone()
    mean, std = MEAN[:channels], STD[:channels]
    found = augment(images, a, mean, std, torch.Generator().manual_seed(seed), torch.float64)
    np.testing.assert_allclose(found.numpy(), literal(images, a, mean, std, seed), rtol=0, atol=1e-13)
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(3, 3, 300, 200), (200, 3, 32, 32), (2, 1, 8, 8), (0, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parts_of_a_batch_are_normalised_as_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first two batches are larger than the cache. A batch of one channel keeps its strides."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.4] * shape[1], [0.3] * shape[1]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (torch.tensor(value, dtype=precise) for value in (1 / (255 * 0.3), 0.4 / 0.3))
    wanted = images.contiguous(memory_format=torch.channels_last).to(precise) * scale - shift
    found = normalize(images, mean, std, dtype)
    assert torch.equal(found, wanted.to(dtype))
    assert found.stride() == wanted.stride()


def test_the_result_is_float32_in_channels_last_memory() -> None:
    found = augment(pictures(), Augmentation(4, True, 16), MEAN, STD, torch.Generator().manual_seed(0))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = literal(pictures(), Augmentation(4, True, 16), MEAN, STD, 0)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    exact = normalize(pictures(), MEAN, STD)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(normalize(pictures(), MEAN, STD, dtype), exact.to(dtype))


def test_every_crop_offset_and_both_sides_come_up_equally_often() -> None:
    n, padding = 20_000, 2
    ramp = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(n, 1, 3, 3)
    centre = random_crop(ramp, padding, torch.Generator().manual_seed(1))[:, 0, 1, 1]
    # The middle pixel shows each pixel of the picture in 1 of 25 cases, and padding in the other 16.
    shares = torch.bincount(centre.long(), minlength=10) / n
    torch.testing.assert_close(shares, torch.tensor([16 / 25] + [1 / 25] * 9), atol=0.01, rtol=0)
    flipped = random_flip(ramp, torch.Generator().manual_seed(2))[:, 0, 0, 0] == 3
    assert abs(flipped.float().mean().item() - 0.5) < 0.02


def test_the_cut_is_centred_uniformly_and_clipped_at_the_border() -> None:
    n, size, length = 50_000, 4, 2
    cut = (cutout(torch.ones(n, 1, size, size), length, torch.Generator().manual_seed(0)) == 0)[:, 0]
    # Rows c-1 and c are cut: row 3 only by c = 3, all others by two of the four centres.
    row = torch.tensor([2.0, 2, 2, 1]) / size
    torch.testing.assert_close(cut.float().mean(0), row[:, None] * row, atol=0.01, rtol=0)
    assert set(cut.sum(dim=(1, 2)).tolist()) == {1, 2, 4}


def test_the_draws_follow_from_the_generator_alone() -> None:
    a = Augmentation(4, True, 8)
    first, again = (augment(pictures(), a, MEAN, STD, torch.Generator().manual_seed(3)) for _ in range(2))
    other = augment(pictures(), a, MEAN, STD, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    augment(pictures(), a, MEAN, STD, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("crop_padding", -1, "use 0 to leave it out"),
        ("cutout", -1, "use 0 to leave it out"),
        ("rand_augment", -1, "use 0 to leave it out"),
        ("rand_augment", 31, "use 30 or less"),
        ("random_erasing", -0.5, "use 0 to leave it out"),
        ("random_erasing", float("nan"), "use 0 to leave it out"),
        ("random_erasing", 1.5, "use 1 or less"),
    ],
)
def test_a_number_outside_its_range_is_refused(field: str, value: float, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^augmentation\.{field}: {value} .*; {remedy}$"):
        Augmentation(**{field: value})  # type: ignore[arg-type]


def test_a_batch_costs_microseconds_a_picture() -> None:
    images, a = pictures(256), Augmentation(4, True, 16)
    generator = torch.Generator().manual_seed(0)

    def seconds() -> float:
        start = time.process_time()
        augment(images, a, MEAN, STD, generator)
        return time.process_time() - start

    # Some 25 us on an idle core; a loop over pictures takes ten times as long.
    assert min(seconds() for _ in range(20)) / len(images) < 100e-6


@pytest.mark.gpu
def test_a_gpu_gives_the_same_augmentation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a = Augmentation(4, True, 8)
    cpu, gpu = (
        augment(pictures().to(device), a, MEAN, STD, torch.Generator().manual_seed(3)).cpu()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(cpu, gpu, atol=1e-6, rtol=0)
