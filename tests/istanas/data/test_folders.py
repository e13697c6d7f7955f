"""Picture folders as people have them: what is read of them, and how; what is left out, refused or told."""

import io
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data import (
    ArrayPictures,
    FilePictures,
    ImageDataset,
    batches,
    load_dataset,
    pictures_digest,
)
from istanas.errors import ConfigError, DataError

Load = Callable[..., ImageDataset]


def save(path: Path, picture: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def grey(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side), value, np.uint8)


def write_folder(root: Path, make: Callable[[int], np.ndarray | Image.Image], suffix: str = ".png") -> Path:
    """Two classes of two training pictures and one test picture each: `make` gets 0..5."""
    number = 0
    for split, count in (("train", 2), ("test", 1)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / split / name / f"{name}{i}{suffix}", make(number))
                number += 1
    return root


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_from(root: Path, **options: object) -> ImageDataset:
        return load_dataset("folder", root=root, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_from


def images(dataset: ImageDataset, split: str = "train") -> torch.Tensor:
    pictures = getattr(dataset, split)
    assert isinstance(pictures, ArrayPictures)
    return pictures.images


# ---------- the cache belongs to the files that were decoded


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)


def overwrite(first: Path, second: Path) -> None:
    """As an archive does that is unpacked once more, the files of which have changed places."""
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


@pytest.mark.parametrize("correct", [swap, overwrite])
def test_corrected_labels_are_not_those_of_the_cache(
    correct: Callable[[Path, Path], None], tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(40 * n), ".bmp")  # all of one size

    def equal_times() -> None:
        for file in root.rglob("*.bmp"):
            os.utime(file, ns=(10**18, 10**18))

    equal_times()
    before = load(root)
    assert images(before)[:, 0, 0, 0].tolist() == [0, 40, 80, 120]
    correct(root / "train" / "ant" / "ant0.bmp", root / "train" / "bee" / "bee0.bmp")
    equal_times()
    after = load(root)
    assert images(after)[:, 0, 0, 0].tolist() == [80, 40, 0, 120]
    assert after.digest != before.digest
    shutil.rmtree(tmp_path / "cache")
    assert load(root).digest == after.digest


# ---------- pixels as they are seen


EXIF_FORMATS = {
    ".jpg": {"quality": 100, "subsampling": 0},
    ".png": {},
    ".tif": {},
    ".webp": {"lossless": True},
}
STORED = {  # EXIF's orientation -> how the upright picture lies in the file
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def upright(side: int) -> np.ndarray:
    """A picture, twice as high as wide, whose quarters differ."""
    quarters = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.uint8)
    return quarters.repeat(side, axis=0).repeat(side // 2, axis=1)


@pytest.mark.parametrize("suffix", EXIF_FORMATS)
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_pictures_are_read_upright(
    side: int, orientation: int, suffix: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path, lambda n: upright(side), suffix)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = root / "train" / "ant" / f"ant0{suffix}"
    stored = np.ascontiguousarray(STORED[orientation](upright(side)))
    save(file, stored, exif=exif.tobytes(), **EXIF_FORMATS[suffix])
    save(root / "train" / "ant" / f"ant1{suffix}", upright(side), **EXIF_FORMATS[suffix])
    dataset = load(root)
    first, second = (pictures_of(dataset, [index])[0].double() for index in (0, 1))
    assert first.shape == second.shape
    assert (first - second).abs().max() <= (24 if suffix == ".jpg" else 0)
    assert f"{side}x{2 * side} pixels" in dataset.notes[0]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16", "CMYK"])
@pytest.mark.parametrize(
    ("side", "orientation"), [*((16, orientation) for orientation in STORED), (80, 6), (80, 7)]
)
def test_uncompressed_tiff_files_are_read_upright(
    side: int, orientation: int, mode: str, tmp_path: Path, load: Load
) -> None:
    def stored(pixels: np.ndarray) -> Image.Image:
        colour = Image.fromarray(np.ascontiguousarray(pixels))
        if mode == "I;16":
            return Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
        return colour.quantize(4) if mode == "P" else colour.convert(mode, dither=Image.Dither.NONE)

    assert stored(upright(side)).mode == mode
    root = write_folder(tmp_path / "pictures", lambda n: stored(upright(side)), ".tif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(root / "train" / "ant" / "ant0.tif", stored(STORED[orientation](upright(side))), exif=exif.tobytes())
    for _ in ("decoded", "from the cache"):
        dataset = load(root)
        first, second = (pictures_of(dataset, [index])[0] for index in (0, 1))
        assert torch.equal(first, second)
        assert f"{side}x{2 * side} pixels" in dataset.notes[0]


@pytest.mark.parametrize("orientation", [None, 0, 9, 65_535])
def test_spoilt_metadata_do_no_harm(orientation: int | None, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path, lambda n: upright(16), ".jpg")
    exif = Image.Exif()
    exif[0x0112] = orientation or 0
    content = b"Exif\0\0no EXIF at all" if orientation is None else exif.tobytes()
    save(root / "train" / "ant" / "ant0.jpg", upright(16), exif=content)
    first, second = images(load(root))[:2]
    assert torch.equal(first, second)


@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_spoilt_metadata_are_not_warned_of(
    side: int, tmp_path: Path, load: Load, recwarn: pytest.WarningsRecorder
) -> None:
    entry = struct.pack("<HHHII", 5, 0x0112, 3, 1, 1)  # of the five entries that it announces, one
    content = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry
    root = write_folder(tmp_path, lambda n: upright(side), ".jpg")
    save(root / "train" / "ant" / "ant0.jpg", upright(side), exif=content)
    pictures_of(load(root), [0])
    assert [str(warning.message) for warning in recwarn] == []


def test_odd_metadata_beside_the_orientation_do_no_harm(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path, lambda n: upright(16), ".png")
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010F] = "maker"
    content = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x63")  # a type that is none
    assert content != exif.tobytes()
    save(root / "train" / "ant" / "ant0.png", np.rot90(upright(16), 2), exif=content)
    first, second = images(load(root))[:2]
    assert torch.equal(first, second)


def pictures_of(dataset: ImageDataset, indices: list[int], split: str = "train") -> torch.Tensor:
    """Bytes of some pictures, as they are measured."""
    loader = batches(
        dataset, split, torch.tensor(indices), batch_size=8, augmentation=None, device=torch.device("cpu"),
        seed=0, epoch=0, shuffle=False, dtype=torch.float64,
    )  # fmt: skip
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return torch.cat([(255 * (b.images * std + mean)).round() for b in loader]).byte()


def shape_in_alpha(mode: str, side: int) -> Image.Image:
    """Black all over, opaque in its left half."""
    alpha = np.zeros((side, side), np.uint8)
    alpha[:, : side // 2] = 255
    colour = {"RGBA": "RGB", "LA": "L"}.get(mode, "P")
    picture = Image.new(colour, (side, side), 0)
    if colour == "P":
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.putdata((alpha == 0).astype(np.uint8).ravel().tolist())
        picture.info["transparency"] = 1
    else:
        picture.putalpha(Image.fromarray(alpha))
    return picture


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("RGBA", ".png", 3),
        ("RGBA", ".webp", 3),
        ("RGBA", ".tif", 3),
        ("RGBA", ".bmp", 3),
        ("LA", ".png", 1),
        ("P", ".png", 3),
        ("P", ".gif", 3),
    ],
)
@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_transparent_pictures_are_composited_over_a_background(
    side: int, mode: str, suffix: str, channels: int, tmp_path: Path, load: Load
) -> None:
    root = tmp_path / "pictures"
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            options = {"lossless": True} if suffix == ".webp" else {}
            save(root / split / name / f"0{suffix}", shape_in_alpha(mode, side), **options)
    dataset = load(root)
    assert dataset.channels == (channels if side == 16 else 3)
    (picture,) = pictures_of(dataset, [0])
    size = picture.shape[2]
    assert picture[:, :, : size // 3].max() == 0
    assert picture[:, :, -size // 3 :].min() == 255
    notes = [note for note in dataset.notes if "transparency" in note]
    assert len(notes) == 1
    assert "4 pictures have transparency" in notes[0]
    assert notes[0].endswith("composited over data.background #ffffff")
    red = load(root, background=(200, 0, 0))
    assert pictures_of(red, [0])[0, :, 0, -1].tolist() == [200, 0, 0]
    assert red.digest != dataset.digest
    assert torch.equal(pictures_of(load(root), [0])[0], picture), "not from the cache of the other background"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_the_transparent_value_of_a_grey_png_is_that_of_the_file(
    side: int, bits: int, tmp_path: Path, load: Load
) -> None:
    """Black and, in the right half, the largest value, which is transparent."""
    row = "0" * (bits * side // 2) + "1" * (bits * side // 2)
    rows = (b"\0" + int(row, 2).to_bytes(bits * side // 8)) * side
    content = png(struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0), rows, struct.pack(">H", 2**bits - 1))
    root = write_folder(tmp_path / "pictures", lambda n: grey(0, side))
    (root / "train" / "ant" / "ant0.png").write_bytes(content)
    dataset = load(root, background=(200, 0, 0))
    (picture,) = pictures_of(dataset, [0])
    assert (picture[:, 0, 0].tolist(), picture[:, 0, -1].tolist()) == ([0, 0, 0], [200, 0, 0])
    assert any("1 picture has transparency" in note for note in dataset.notes)


@pytest.mark.parametrize("alpha", [0, 255])
def test_bmp_files_of_32_bits_without_transparency_stay_as_they_are(
    alpha: int, tmp_path: Path, load: Load
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    dataset = load(write_folder(tmp_path, lambda n: pixels[n], ".bmp"))
    np.testing.assert_array_equal(images(dataset)[1], pixels[1][..., :3].transpose(2, 0, 1))
    assert len(dataset.notes) == 1


def test_opaque_pictures_with_an_alpha_channel_stay_as_they_are(tmp_path: Path, load: Load) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (8, 8, 4), dtype=np.uint8) for _ in range(6)]
    for array in pixels:
        array[..., 3] = 255
    dataset = load(write_folder(tmp_path, lambda n: pixels[n]))
    np.testing.assert_array_equal(images(dataset)[1], pixels[1][..., :3].transpose(2, 0, 1))


# ---------- more than 8 bits


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize(
    ("peak", "bits"),
    [(255, 8), (200, 8), (20, 8), (256, 9), (4000, 12), (4095, 12), (40_000, 16), (65_535, 16)],
)
@pytest.mark.parametrize("side", [8, 80], ids=["small", "large"])
def test_deep_grey_pictures_keep_the_upper_8_of_the_bits_they_use(
    side: int, peak: int, bits: int, suffix: str, tmp_path: Path, load: Load
) -> None:
    values = np.linspace(0, peak, 6).round().astype(np.uint16)
    root = write_folder(tmp_path / "pictures", lambda n: np.full((side, side), values[n]), suffix)
    save(root / "train" / "bee" / f"bee1{suffix}", np.full((side, side), peak, np.uint16))
    dataset = load(root)
    used = [*values[:3], peak]
    read = pictures_of(dataset, [0, 1, 2, 3])[:, 0, 0, 0].tolist()
    assert read == [int(value) >> (bits - 8) for value in used]
    assert dataset.decode_settings.bits == bits
    kept = "values 0 to 255 are kept as they are" if bits == 8 else f"the upper 8 of the {bits} bits"
    assert [note for note in dataset.notes if kept in note] == [*dataset.notes[1:]]
    assert len({*read}) == 4


def test_bits_are_decided_by_the_training_pictures(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: np.full((8, 8), 40 * n, np.uint16))
    before = load(root)
    bright = save(root / "test" / "ant" / "ant0.png", np.full((8, 8), 60_000, np.uint16))
    dataset = load(root)
    assert (dataset.decode_settings.bits, dataset.train_digest) == (8, before.train_digest)
    assert images(dataset, "test")[:, 0, 0, 0].tolist() == [255, 200]
    assert dataset.notes[-1] == (
        f"1 picture has values above 255, the largest of 8 bits, such as {bright}: such pixels become white"
    )


@pytest.mark.parametrize("side", [8, 80], ids=["small", "large"])
@pytest.mark.parametrize("train_type", [np.uint8, np.uint16], ids=["8-bit files", "16-bit files"])
def test_a_test_split_of_another_range_is_refused(
    train_type: type, side: int, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: np.full((side, side), 40 * n, train_type))
    for number, name in enumerate(("ant", "bee")):
        save(root / "test" / name / f"{name}0.png", np.full((side, side), 100 * number, np.uint16))
    dataset = load(root)
    assert pictures_of(dataset, [0, 1], "test")[:, 0, 0, 0].tolist() == [0, 100]
    assert any("values 0 to 255 are kept as they are" in note for note in dataset.notes)
    for name in ("ant", "bee"):
        save(root / "test" / name / f"{name}0.png", np.full((side, side), 4000, np.uint16))
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value) == (
        f"data.root: {root}/test/ant/ant0.png has values up to 4,000, and 2 test pictures in all above the 8 bits "
        "(0 to 255) of the training pictures; scale both splits to one range"
    )


def hot_pixel(path: Path) -> Path:
    with Image.open(path) as picture:
        pixels = np.array(picture)
    pixels[0, 0] = 65_535
    return save(path, pixels)


@pytest.mark.parametrize("side", [8, 80], ids=["small", "large"])
def test_hot_pixels_take_no_bits_from_the_others(side: int, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: np.full((side, side), 700 * n, np.uint16))
    hot = hot_pixel(root / "train" / "ant" / "ant0.png")
    hot_pixel(root / "train" / "bee" / "bee0.png")
    hot_pixel(root / "test" / "ant" / "ant0.png")
    dataset = load(root)
    assert dataset.decode_settings.bits == 12
    assert pictures_of(dataset, [0, 1, 2, 3])[:, 0, -1, -1].tolist() == [0, 700 >> 4, 1400 >> 4, 2100 >> 4]
    assert dataset.notes[-1] == (
        f"3 pictures have values above 4,095, the largest of 12 bits, such as {hot}: such pixels become white"
    )


@pytest.mark.parametrize(("bright", "bits"), [(1, 12), (2, 16)])
def test_a_hundredth_of_the_training_pictures_does_not_decide_the_bits(
    bright: int, bits: int, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: np.full((8, 8), 700 * n, np.uint16))
    for number in range(96):
        value = 65_535 if number < bright else 4000
        save(root / "train" / "ant" / f"more{number}.png", np.full((8, 8), value, np.uint16))
    assert load(root).decode_settings.bits == bits


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF of (H, W, C) values of 8 or 16 bits: `planar` 2 stores C planes, `photometric` as given."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    planes = [pixels] if tags["planar"] == 1 else [pixels[..., i] for i in range(channels)]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    data, places = b"", []
    for strip in strips:
        places.append(8 + len(data))
        data += strip

    def stored(kind: str, values: list[int]) -> int:
        """The values, or where they lie if there are several."""
        nonlocal data
        if len(values) == 1:
            return values[0]
        place = 8 + len(data)
        data += struct.pack(f"<{len(values)}{kind}", *values)
        return place

    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, stored("H", [bits] * channels)),
        (259, 3, 1, 1),
        (262, 3, 1, tags["photometric"]),
        (273, 4, len(strips), stored("I", places)),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, len(strips), stored("I", [len(strip) for strip in strips])),
        (284, 3, 1, tags["planar"]),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def deep_png(channels: int) -> bytes:
    """A PNG of 16 bits per channel, which Pillow opens as one of 8: 2 grey and alpha, 3 colour, 4 both."""
    rows = np.full((8, 8, channels), 200, ">u2")
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    return png(
        struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0),
        b"".join(b"\0" + row.tobytes() for row in rows),
    )


def png(header: bytes, rows: bytes, transparent: bytes = b"", level: int = -1) -> bytes:
    """A PNG of the given header and rows, each of which begins with its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("9.png", deep_png(2), "more than 8 bits per channel"),
        ("9.png", deep_png(3), "more than 8 bits per channel"),
        ("9.png", deep_png(4), "more than 8 bits per channel"),
        (
            "9.tif",
            tiff(np.full((8, 8, 3), 20_000, np.uint16), planar=1, photometric=2),
            "more than 8 bits per channel",
        ),
        (
            "9.tif",
            tiff(np.full((8, 8, 3), 20_000, np.uint16), planar=2, photometric=2),
            "more than 8 bits per channel",
        ),
        (
            "9.tif",
            tiff(np.full((8, 8, 4), 20_000, np.uint16), planar=2, photometric=2),
            "more than 8 bits per channel",
        ),
        (
            "9.tif",
            tiff(np.full((8, 8, 1), 200, np.uint16), planar=1, photometric=0),
            "16 bits where 0 is white",
        ),
        ("9.ppm", b"P6\n8 8\n4095\n" + bytes(8 * 8 * 6), "more than 8 bits per channel"),
        ("9.tif", Image.new("F", (8, 8)), "pixels of mode F have no fixed range"),
        ("9.tif", Image.new("I", (8, 8)), "pixels of mode I have no fixed range"),
    ],
    ids=[
        *("grey alpha png", "colour png", "colour alpha png", "colour tiff", "colour tiff in planes"),
        *("colour alpha tiff in planes", "inverted tiff", "ppm", "float", "32 bits"),
    ],
)
@pytest.mark.parametrize("size", [None, 80])
def test_pixels_that_would_lose_values_are_refused(
    size: int | None, name: str, content: bytes | Image.Image, why: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    file = root / "train" / "bee" / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save(file, content)
    with pytest.raises(DataError, match=why) as caught:
        load(root, image_size=size)
    assert str(caught.value).startswith(f"data.root: {file} is not a readable picture (")
    assert re.search("; (scale|scale all|store) such pictures", str(caught.value))
    assert "replace or delete" not in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------- what is left out


def test_jfif_files_are_read(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n), ".jpg")
    for file in [*root.glob("*/*/*.jpg")]:
        file.rename(file.with_suffix(".jfif"))
    dataset = load(root)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def in_a_sub_folder(folder: Path) -> Path:
    return folder / "more" / "even more" / "1.png"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (in_a_sub_folder, "in sub-folders"),
        (lambda folder: folder / "1.heic", r"with the suffix \.heic"),
        (lambda folder: folder / "1.AVIF", r"with the suffix \.avif"),
        (lambda folder: folder / "all.zip", r"with the suffix \.zip"),
        (lambda folder: folder / "picture", "without a suffix"),
        (lambda folder: folder.parent / "1.png", "outside the class folders"),
    ],
    ids=["sub-folder", "heic", "avif", "archive", "no suffix", "no class"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_left_out_stops_unless_it_is_allowed(
    split: str, place: Callable[[Path], Path], why: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    file = place(root / split / "bee")
    save(root / "other.png", grey(1))
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "other.png", file)
    message = rf"1 of \d files of .* would be left out \(1 file {why}, such as {re.escape(str(file))}\)"
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert str(caught.value).endswith("--set data.allow_left_out=true")
    dataset = load(root, allow_left_out=True)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    (note,) = dataset.notes[1:]
    assert re.match(rf"left out: 1 file {why}, such as ", note)


def test_a_hundredth_of_a_class_may_be_left_out_and_is_told(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    for i in range(97):
        save(root / "train" / "bee" / f"more{i:02}.png", grey(i))
    (root / "train" / "bee" / "1.heic").touch()
    for name in ("notes.txt", "1.json", "Thumbs.db", ".hidden.heic"):
        (root / "train" / "bee" / name).touch()
    assert load(root).notes[1:] == (
        f"left out: 1 file with the suffix .heic, such as {root}/train/bee/1.heic",
    )
    (root / "train" / "bee" / "2.heic").touch()
    with pytest.raises(
        DataError, match=r"2 of 101 files of .*bee would be left out \(2 files with the suffix"
    ):
        load(root)


@pytest.mark.parametrize(
    ("read", "ignored"), [("test", "val"), ("test", "valid"), ("test", "validation"), ("val", "valid")]
)
def test_a_second_split_for_testing_is_counted_and_does_not_stop_a_job(
    read: str, ignored: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    shutil.copytree(root / "train", root / ignored)
    (root / ignored / "labels.csv").touch()
    (root / "test").rename(root / read)
    dataset = load(root)
    assert len(dataset.test) == 2
    assert dataset.notes[1:] == (
        f"left out: 4 files in {ignored}/, which is ignored because {read}/ exists, such as "
        f"{root}/{ignored}/ant/ant0.png",
    )


def test_a_link_to_the_split_that_is_read_is_not_left_out(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    (root / "val").symlink_to("test")
    assert len(load(root).notes) == 1


def test_only_the_first_frame_is_read_and_that_is_told(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(10 * n), ".gif")
    frames = [Image.fromarray(grey(value)) for value in (50, 100)]
    save(root / "train" / "ant" / "ant0.gif", frames[0], save_all=True, append_images=frames[1:])
    dataset = load(root)
    assert any("1 picture has several frames" in note for note in dataset.notes)
    assert images(dataset)[0, :, 0, 0].unique().tolist() == [50]


# ---------- small or large


def test_one_large_picture_first_does_not_make_a_folder_large(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 16))
    first = root / "train" / "ant" / "ant0.png"
    save(first, grey(0, 80))
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value) == (
        f"data.root: {first} has 80x80 pixels, others have 16x16; "
        "scale all to one size with --set data.image_size=16"
    )
    dataset = load(root, image_size=16)
    assert dataset.notes == (
        "folder: 4 training and 2 test pictures of 2 classes, 16x16 to 80x80 pixels, grey, scaled and cropped to "
        "16x16, kept in memory",
    )
    assert images(dataset).shape == (4, 1, 16, 16)


def test_one_small_picture_first_does_not_make_a_folder_small(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 80))
    save(root / "train" / "ant" / "ant0.png", grey(0, 16))
    save(root / "train" / "bee" / "bee0.png", grey(0, 64))
    save(root / "train" / "bee" / "bee2.png", grey(0, 96))
    dataset = load(root)
    assert isinstance(dataset.train, FilePictures)
    assert dataset.notes == (
        "folder: 5 training and 2 test pictures of 2 classes, 16x16 to 96x96 pixels, grey, scaled and cropped to "
        "224x224, read from their files in every epoch",
    )


@pytest.mark.parametrize(("small", "is_large"), [(1, True), (2, False)])
def test_pictures_are_large_if_more_than_half_are(
    small: int, is_large: bool, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 120))
    for number in range(small):
        save(root / "train" / "ant" / f"ant{number}.png", grey(0, 16))
    if is_large:
        assert isinstance(load(root).train, FilePictures)
    else:
        with pytest.raises(DataError, match="16x16"):
            load(root)


@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_grey_pictures_are_called_grey(side: int, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, side))
    save(root / "train" / "ant" / "ant0.png", shape_in_alpha("LA", side))
    assert ", grey, " in load(root).notes[0]
    assert ", colour, " in load(root, background=(200, 0, 0)).notes[0]
    save(root / "train" / "ant" / "ant0.png", upright(side)[:side])
    assert ", colour, " in load(root).notes[0]


def test_every_data_set_is_described_in_one_line() -> None:
    start = "digits: 1,438 training and 359 test pictures of 10 classes, 8x8 pixels, grey"
    assert load_dataset("digits").notes == (f"{start}, kept in memory",)
    assert load_dataset("digits", image_size=32).notes == (f"{start}, scaled to 32x32, kept in memory",)
    assert load_dataset("digits", image_size=8).notes == (f"{start}, kept in memory",)


# ---------- names


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    os.rename(os.fsencode(root / "train" / "bee"), os.fsencode(root / "train") + b"/caf\xe9")
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value) == (
        f"data.root: the name of {root}/train/caf\\udce9 is not UTF-8; rename the folder"
    )
    odd = Path(os.fsdecode(os.fsencode(root) + b"\xe9"))
    root.rename(odd)
    with pytest.raises(DataError, match=r"the name of .*pictures\\udce9 is not UTF-8"):
        load(odd)


def test_pictures_may_have_names_that_are_not_utf8(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(40 * n, 80))
    odd = root / "train" / "ant" / os.fsdecode(b"ant\xe9.png")
    (root / "train" / "ant" / "ant0.png").rename(odd)
    assert pictures_of(load(root), [1])[0, 0, 0, 0] == 0
    odd.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"ant\\udce9\.png is not a readable picture") as caught:
        load(root)
    str(caught.value).encode()


@pytest.mark.parametrize("split", ["train", "test"])
def test_names_that_only_look_alike_are_told_by_their_code_points(
    split: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (root / "train" / "ant").rename(root / "train" / composed)
    (root / "test" / "ant").rename(root / "test" / composed)
    (root / split / "bee").rename(root / split / decomposed)
    with pytest.raises(DataError, match="names of one class with different code points") as caught:
        load(root)
    assert "U+00E9" in str(caught.value)
    assert "U+0065 U+0301" in str(caught.value)


@pytest.mark.parametrize("name", ["123", "2024-01-01", "@eaDir", "[x]", "a b #1", "null"])
def test_any_other_name_is_that_of_a_class(name: str, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / name, lambda n: grey(n))
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / name)
    assert set(load(root).class_names) == {name, "bee"}


def test_a_folder_inside_a_folder_of_an_archive_is_named(tmp_path: Path, load: Load) -> None:
    write_folder(tmp_path / "pictures" / "pictures", lambda n: grey(n))
    with pytest.raises(
        DataError, match=rf"train is missing; set data\.root to {tmp_path}/pictures/pictures$"
    ):
        load(tmp_path / "pictures")
    inner = tmp_path / "pictures" / "pictures"
    (inner / "train").rename(inner / "kept")
    (inner / "train").mkdir()
    (inner / "kept").rename(inner / "train" / "train")
    with pytest.raises(
        DataError,
        match=r"has only one class, train; move the folders in .*train/train one level up$",
    ):
        load(inner)


# ---------- broken files


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm"])
@pytest.mark.parametrize("keep", [0, 60, 0.6], ids=["empty", "header", "cut"])
def test_a_broken_large_test_picture_is_found_at_the_start(
    keep: float, suffix: str, tmp_path: Path, load: Load
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for _ in range(6)]
    root = write_folder(tmp_path / "pictures", lambda n: noise[n], suffix)
    whole = load(root)
    broken = root / "test" / "bee" / f"bee0{suffix}"
    content = broken.read_bytes()
    broken.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value).startswith(f"data.root: {broken} is not a readable picture (")
    assert str(caught.value).endswith("; replace or delete it")
    broken.unlink()
    without = load(root)
    assert without.train_digest == whole.train_digest
    assert without.digest != whole.digest


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def exif_with_thumbnail(pixels: np.ndarray) -> bytes:
    """EXIF as cameras write it, with a small JPEG of the picture and its own end mark."""
    thumbnail = jpeg(pixels[::4, ::4])
    first = struct.pack("<HHHII", 1, 0x0112, 3, 1, 1)
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail))
    start = b"II*\0" + struct.pack("<I", 8) + first + struct.pack("<I", 26) + second + bytes(4)
    assert len(start) == 56
    return b"Exif\0\0" + start + thumbnail


NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)


def noise_png(level: int = -1) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in NOISE)
    return png(struct.pack(">IIBBBBB", 300, 300, 8, 2, 0, 0, 0), rows, level=level)


def webp(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=95)
    return out.getvalue()


def zeros_at_the_tail(content: bytes) -> bytes:
    kept = 7 * len(content) // 10
    return content[:kept] + bytes(len(content) - kept)


def hole(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(2048) + content[middle + 2048 :]


def cut(content: bytes) -> bytes:
    return content[: 7 * len(content) // 10]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("9.jpg", cut(jpeg(NOISE[:90, :90], exif=exif_with_thumbnail(NOISE[:90, :90])))),
        ("9.jpg", cut(jpeg(NOISE, exif=exif_with_thumbnail(NOISE)))),
        ("9.jpg", zeros_at_the_tail(jpeg(NOISE, exif=exif_with_thumbnail(NOISE)))),
        (
            "9.png",
            hole(
                png(
                    struct.pack(">IIBBBBB", 90, 90, 8, 0, 0, 0, 0),
                    b"".join(b"\0" + row.tobytes() for row in NOISE[:90, :90, 0]),
                )
            ),
        ),
        ("9.png", hole(noise_png())),
        ("9.png", hole(noise_png(level=0))),
        ("9.png", zeros_at_the_tail(noise_png())),
        ("9.webp", zeros_at_the_tail(webp(NOISE[:90, :90]))),
        ("9.webp", zeros_at_the_tail(webp(NOISE))),
    ],
    ids=[
        *("small jpeg cut", "jpeg cut", "jpeg with zeros", "small png with a hole", "png with a hole"),
        *("stored png with a hole", "png with zeros", "small webp with zeros", "webp with zeros"),
    ],
)
def test_damage_that_decoders_may_not_notice_is_found(
    name: str, content: bytes, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 80))
    file = root / "test" / "bee" / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value).startswith(f"data.root: {file} is not a readable picture (it is ")
    assert str(caught.value).endswith("; replace or delete it")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("9.jpg", jpeg(NOISE) + bytes(5000)),
        (
            "9.jpg",
            jpeg(NOISE, exif=exif_with_thumbnail(NOISE)) + b"SEFT" + bytes(70_000) + b"data of the camera",
        ),
        ("9.jpg", jpeg(np.full((900, 900, 3), 128, np.uint8), optimize=True)),
        ("9.png", noise_png() + b"more"),
        ("9.png", png(struct.pack(">IIBBBBB", 400, 400, 8, 0, 0, 0, 0), bytes(401 * 400), level=0)),
        ("9.webp", webp(np.full((2000, 2000, 3), 128, np.uint8))),
    ],
    ids=["padded jpeg", "camera", "flat jpeg", "png and more", "black stored png", "flat webp"],
)
def test_complete_files_pass_whatever_follows(name: str, content: bytes, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 80))
    (root / "test" / "bee" / name).write_bytes(content)
    assert len(load(root).test) == 3


def test_an_empty_file_is_called_empty(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    (root / "test" / "bee" / "9.png").touch()
    with pytest.raises(
        DataError, match=r"9\.png is not a readable picture \(the file is empty\); replace or delete it"
    ):
        load(root)


def test_all_broken_pictures_are_counted_and_progress_is_told(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 80))
    seen: list[tuple[int, int]] = []
    load(root, checking=lambda done, total: seen.append((done, total)))
    load(root, checking=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 6)], "the second time it is known"
    for name in ("ant", "bee"):
        (root / "test" / name / f"{name}0.png").write_text("no picture")
    with pytest.raises(DataError, match=r"ant0\.png .*, nor is one other; replace or delete them"):
        load(root)


def test_large_pictures_that_change_places_are_other_data(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(40 * n, 300), ".bmp")  # all of one size
    before = load(root)
    swap(root / "train" / "ant" / "ant0.bmp", root / "train" / "bee" / "bee0.bmp")
    after = load(root)
    assert before.digest != after.digest
    assert before.train_digest != after.train_digest
    everything = torch.arange(4)
    assert pictures_digest(before.train, everything, "ab") != pictures_digest(after.train, everything, "ab")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert load(copy).digest == after.digest


# ---------- class folders without splits


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    """Grey pictures of some classes, each with a value of its own."""
    root.mkdir()
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            save(root / name / f"{i:02}.png", grey(50 * number + i))
    return root


def test_a_fraction_of_each_class_is_the_test_split(tmp_path: Path, load: Load) -> None:
    root = class_folders(tmp_path / "pictures", {"ant": 20, "bee": 10, "cat": 5})
    dataset = load(root, test_fraction=0.2)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert torch.bincount(dataset.test.labels).tolist() == [4, 2, 1]
    assert torch.bincount(dataset.train.labels).tolist() == [16, 8, 4]
    assert dataset.train.labels.tolist() == sorted(dataset.train.labels.tolist())
    for split in ("train", "test"):
        values, labels = images(dataset, split)[:, 0, 0, 0], getattr(dataset, split).labels
        assert torch.equal(values // 50, labels.to(values.dtype)), split
    both = torch.cat([images(dataset, "train"), images(dataset, "test")])
    assert len(both.flatten(1).unique(dim=0)) == 35, "no picture is in both splits"
    again = load(root, test_fraction=0.2)
    assert (again.digest, again.train_digest) == (dataset.digest, dataset.train_digest)
    assert load(root, test_fraction=0.4).train_digest != dataset.train_digest
    large = load(root, test_fraction=0.2, image_size=96)
    assert isinstance(large.test, FilePictures)
    assert torch.equal(large.test.labels, dataset.test.labels)


@pytest.mark.parametrize(
    ("counts", "fraction", "says"),
    [
        (
            {"ant": 9, "bee": 1},
            0.9,
            r"bee contains 1 picture, of which none would be left for training; add some",
        ),
        ({"ant": 2, "bee": 2}, 0.1, r"data\.test_fraction: 0\.1 of 4 pictures is no test picture; raise it"),
        (
            {"ant": 2},
            0.2,
            r"pictures has only one class, ant; two or more are needed, each in its own folder",
        ),
        (
            {"ant": 2},
            0.0,
            r"pictures has only one class, ant; two or more are needed, each in its own folder",
        ),
        *(
            case
            for fraction in (0.0, 0.2)
            for case in (
                (
                    {},
                    fraction,
                    r"pictures has no pictures; put them into CLASS/\*, one folder for each class",
                ),
                ({"ant": 0}, fraction, r"pictures has no pictures; "),
                (
                    {".": 3},
                    fraction,
                    r"pictures has 3 pictures but no class folders; put them into CLASS/\*$",
                ),
            )
        ),
        ({"ant": 0, "bee": 0}, 0.2, r"ant contains no picture; add some"),
        ({"ant": 1, "bee": 0}, 0.2, r"bee contains no picture; add some"),
        (
            {"train": 1, "test": 1},
            0.0,
            r"train has 1 picture but no class folders; put them into train/CLASS/\*$",
        ),
        (
            {"x/ant": 1, "x/bee": 1},
            0.0,
            r"only one folder, x, which has the class folders; set data.root to .*/x$",
        ),
        (
            {"train/ant": 2, "train/bee": 2},
            0.2,
            r"data\.test_fraction: 0\.2 .* which has train/; set it to 0",
        ),
        ({"ant": 2, "bee": 2, "val": 2}, 0.2, r"data\.test_fraction: 0\.2 would divide .* which has val/"),
        (
            {"ant": 2, "bee": 2},
            0.0,
            r"train is missing; put the pictures .*, or let data\.test_fraction choose them",
        ),
    ],
)
def test_a_folder_that_cannot_be_divided_is_refused(
    counts: dict[str, int], fraction: float, says: str, tmp_path: Path, load: Load
) -> None:
    with pytest.raises(DataError, match=says):
        load(class_folders(tmp_path / "pictures", counts), test_fraction=fraction)


def test_other_data_sets_have_a_test_split() -> None:
    with pytest.raises(ConfigError, match=r"data\.test_fraction: 0\.2 has no effect on digits"):
        load_dataset("digits", test_fraction=0.2)
