"""Pixels of picture folders: orientation, transparency, and more than 8 bits."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.errors import DataError
from tests.istanas.data.picture_files import (
    Load,
    grey,
    images,
    pictures_of,
    png,
    save,
    shape_in_alpha,
    upright,
    write_folder,
)

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
