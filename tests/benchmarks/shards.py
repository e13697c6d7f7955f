"""Shards against a picture folder: reading, start-up on the index of ImageNet's size, and memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks --only shards

The pictures are JPEG files of about 500x375 pixels, smooth noise with texture. `start-up` and `memory` are measured in
processes of their own, which run this module: python -m tests.benchmarks.shards KIND FOLDER.
"""

import builtins
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from PIL import Image

from istanas.data import Augmentation, FilePictures, ImageDataset, batches, load_dataset
from istanas.data.packing import PackSettings, pack_folder
from istanas.data.shard_files import SAMPLE, Shard, excerpt_of
from istanas.data.shard_index import rows_table, write_index
from istanas.data.survey import FACTS
from tests.benchmarks.harness import Row, compare

PICTURES, ROUNDS, EPOCHS = 80, 3, 3
LATENCY_S = 0.010
IMAGENET, TESTED, CLASSES = 1_281_167, 50_000, 1000
SHARD_BYTES = 256_000_000
MIB = 2**20


def write_folder(root: Path, n: int) -> Path:
    """Write `n` training pictures and some test pictures of 20 classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", n), ("test", 20)):
        for i in range(count):
            folder = root / split / f"class{i % 20:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            width, height = 500 + int(rng.integers(-40, 41)), 375 + int(rng.integers(-40, 41))
            smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
            texture = rng.normal(0, 12, (height, width, 1))
            pixels = np.clip(np.asarray(smooth, np.float32) + texture, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)
    return root


def epoch_of(dataset: ImageDataset, epoch: int = 0, workers: int = 0) -> None:
    for _ in batches(
        dataset,
        "train",
        None,
        batch_size=32,
        augmentation=Augmentation(horizontal_flip=True),
        device=torch.device("cpu"),
        seed=0,
        epoch=epoch,
        shuffle=True,
        workers=workers,
    ):
        pass


def read_all(dataset: ImageDataset) -> None:
    """Read the bytes of all training pictures in a random order, without decoding them."""
    assert isinstance(dataset.train, FilePictures)
    for index in np.random.default_rng(0).permutation(len(dataset.train)).tolist():
        source = dataset.train.source(index)
        if isinstance(source, str):
            with builtins.open(source, "rb") as file:
                file.read()


@contextmanager
def slow_opens() -> Iterator[None]:
    """Let every opening of a file take 10 ms more, as on a distant file system."""

    def slowed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike):
                time.sleep(LATENCY_S)
            return original(path, *arguments, **options)

        return call

    # Only the modules that read pictures look these names up while it lasts.
    with mock.patch("builtins.open", slowed(builtins.open)), mock.patch("os.open", slowed(os.open)):
        yield


def reading(folder: Path, shards: Path, scaled: Path, cache: Path) -> list[Row]:
    """Compare shards of the whole pictures, and of pictures that were scaled to 256 pixels, with the folder."""
    files = load_dataset("folder", root=folder, image_size=224, cache_dir=cache)
    packed = load_dataset("webdataset", root=shards, image_size=224, cache_dir=cache)
    n = len(packed.train)

    def fresh(work: Callable[[ImageDataset], None], root: Path = shards) -> Callable[[], None]:
        """Open the shards again in every round, as each job does once."""
        return lambda: work(load_dataset("webdataset", root=root, image_size=224, cache_dir=cache))

    def against_files(
        work: str,
        ours: Callable[[], None],
        bound: float | None,
        read: Callable[[ImageDataset], None] = epoch_of,
    ) -> Row:
        return compare(work, ours, lambda: read(files), bound, rounds=ROUNDS, per=n)

    # Bounds are for regressions: reading is 1 % of the time on a local disk, and with slow openings, decoding limits
    # the ratio (docs/imagenet.md, "Disk, network and memory").
    whole, small = "shards against folder, 224x224", "shards scaled to 256 pixels against folder, 224x224"
    rows = [
        against_files(f"{whole}, local disk", lambda: epoch_of(packed), 0.9),
        against_files(f"{small}, local disk", fresh(epoch_of, scaled), None),
        against_files("reading only, local disk", lambda: read_all(packed), None, read_all),
    ]
    with slow_opens():
        rows += [
            against_files(f"{whole}, 10 ms per open", fresh(epoch_of), 2.0),
            against_files(f"{small}, 10 ms per open", fresh(epoch_of, scaled), None),
            against_files("reading only, 10 ms per open", fresh(read_all), 5.0, read_all),
        ]
    return rows


# ---------- an index of ImageNet's size
def write_large_index(root: Path) -> None:
    """Write an index of ImageNet's size, and shards of zeros that take no space on the disk."""
    shards, tables = [], []
    rng = np.random.default_rng(0)
    for split, n in (("train", IMAGENET), ("test", TESTED)):
        (root / split).mkdir(parents=True)
        per_shard = SHARD_BYTES // 115_000
        for number, first in enumerate(range(0, n, per_shard)):
            count = min(per_shard, n - first)
            name = f"{split}/shard-{number:06d}.tar"
            with open(root / name, "wb") as file:
                file.truncate(SHARD_BYTES)
            samples = np.zeros(count, SAMPLE)
            samples["offset"] = np.arange(count) * 115_000
            samples["size"], samples["start"], samples["length"] = 112_000, 512, 110_000
            facts = np.zeros(count, FACTS)
            facts["width"], facts["height"] = 500, 375
            facts["fingerprint"] = rng.integers(0, 256, (count, 8))
            labels = rng.integers(0, CLASSES, count) if first else np.arange(count) % CLASSES
            classes = [f"n{label:08d}" for label in labels.tolist()]
            names = [f"{name}_{first + i}.JPEG" for i, name in enumerate(classes)]
            excerpt = excerpt_of(lambda offset, size: bytes(size), SHARD_BYTES)
            shards.append(Shard(name, SHARD_BYTES, count, "", excerpt))
            tables.append(rows_table(classes, names, samples, facts))
    write_index(root, shards, tables)


def start_up(root: Path) -> dict[str, float]:
    """Open the data of a search on subsets of 10 % and 2.5 %, check and record it, as a job does."""
    began = time.perf_counter()
    from pipeline.config.load import load
    from pipeline.training.pictures import data_digest, datasets_used, open_dataset, settle_stems

    config = load(
        None,
        [
            "data.name=webdataset",
            f"data.root={root}",
            f"search.max_pictures={round(0.125 * IMAGENET)}",
            "search.alpha_fraction=0.2",
        ],
    )
    config = settle_stems(config)
    dataset = open_dataset(config, ["search"])
    digest, used = data_digest(config, dataset, "search"), datasets_used(config, dataset, "search")
    loader = batches(
        dataset,
        "train",
        None,
        batch_size=256,
        augmentation=None,
        device=torch.device("cpu"),
        seed=0,
        epoch=0,
        shuffle=True,
    )
    assert digest
    assert len(loader)
    assert [use.pictures for use in used] == [128_117, 32_029]
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "mib": peak_mib(),
    }


def peak_mib() -> float:
    """Return the peak of this process's resident memory. getrusage would also count that of its parent before exec."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def memory(root: Path) -> dict[str, list[float]]:
    """Return the resident MiB of a process that decodes pictures after each epoch."""
    dataset = load_dataset("webdataset", root=root, image_size=224)
    found = []
    for epoch in range(EPOCHS + 1):
        epoch_of(dataset, epoch)
        found.append(psutil.Process().memory_info().rss / MIB)
    return {"mib": found[1:]}  # without the first, in which modules are imported


def measured_apart(kind: str, root: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.shards", kind, str(root)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def single(work: str, value: float, bound: float, unit: str) -> Row:
    return Row(work, value, (value, value), bound, value, unit=unit, kind="at most")


def measure() -> list[Row]:
    """Return the rows of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder, shards, cache = write_folder(place / "pictures", PICTURES), place / "shards", place / "cache"
        pack_folder(folder, shards, PackSettings(2_000_000), cache_dir=cache)
        scaled = place / "scaled"
        pack_folder(folder, scaled, PackSettings(2_000_000, resize=256, quality=92), cache_dir=cache)
        rows = reading(folder, shards, scaled, cache)
        write_large_index(place / "large")
        runs = [measured_apart("start-up", place / "large") for _ in range(ROUNDS)]
        seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
        peak = max(run["mib"] for run in runs) * MIB / 1e6
        resident = measured_apart("memory", shards)["mib"]
    return [
        *rows,
        single("start-up, 1.3 million entries, s", seconds, 10.0, "s"),
        single("start-up, 1.3 million entries, CPU seconds with imports", cpu, 10.0, "s"),
        single("start-up, 1.3 million entries, MB", peak, 1000.0, "MB"),
        single("resident memory, epoch 3 over 1", resident[-1] / resident[0], 1.05, "x"),
    ]


def main() -> None:
    kind, folder = sys.argv[1:]
    print(json.dumps({"start-up": start_up, "memory": memory}[kind](Path(folder))))


if __name__ == "__main__":
    main()
