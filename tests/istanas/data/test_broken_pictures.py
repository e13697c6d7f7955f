"""Broken pictures in a folder are found, counted and named."""

import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data import (
    pictures_digest,
)
from istanas.errors import DataError
from tests.istanas.data.picture_files import (
    Load,
    grey,
    png,
    swap,
    write_folder,
)


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
