"""Pictures of four textures, in an archive as somebody with pictures of their own has one."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_archive(folder: Path) -> None:
    """Write photos.tar.gz with 300 colour pictures of four textures, `photos/CLASS/*`, around 130x110 pixels."""
    rng = np.random.default_rng(0)
    for name in ("checks", "dots", "rings", "stripes"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(75):
            height, width = int(rng.integers(100, 120)), int(rng.integers(120, 141))
            y, x = np.mgrid[:height, :width]
            period = rng.uniform(8, 16)
            waves = {
                "checks": np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period),
                "dots": np.cos(2 * np.pi * x / period) + np.cos(2 * np.pi * y / period) - 1,
                "rings": np.sin(2 * np.pi * np.hypot(x - width / 2, y - height / 2) / period),
                "stripes": np.sin(2 * np.pi * x / period),
            }
            colours = rng.integers(0, 256, (2, 3))
            pixels = np.where(waves[name][..., None] > 0, *colours) + rng.normal(0, 10, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / "photos" / name / f"{number}.jpg"
            )
    with tarfile.open(folder / "photos.tar.gz", "w:gz") as archive:
        archive.add(folder / "photos", "photos")
    shutil.rmtree(folder / "photos")
