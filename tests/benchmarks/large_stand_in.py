"""The whole path of ImageNet on a stand-in: 20 classes, 2,000 JPEG files of mixed sizes, made from noise and textures.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.large_stand_in OUT

OUT receives the pictures, the shards, the configurations, the runs and `table.csv`. A two-stage search uses the subsets
of the literature, 10 % of the training pictures for the weights and 2.5 % for the alphas; its result is retrained, and
a one-stage search trains on all pictures. Each of these runs from the folder and from the shards; the two-stage search
also on two Ray workers, from the folder, the shards and a bucket of a local S3 server (moto). Pictures have 96x96
pixels after the crop, so that they take the path of large pictures, and networks are tiny, so that a job takes seconds.

Of each job, weights, optimisers, codes and the figures of all epochs must equal those from the folder, bit for bit. The
jobs in `KILLED` are terminated by SIGKILL after their first epoch, and resumed by the same command. The exit code is 1
if a job differs. The script continues after an interruption with the same command; finished runs are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from istanas.data.packing import PackSettings, pack_folder
from pipeline.config.yaml_files import dump
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, GENOTYPE_FILE, WEIGHTS_FILE
from tests.benchmarks.harness import cpu_seconds
from tests.benchmarks.large_pictures import picture
from tests.chaos.checks import bits
from tests.istanas.data.test_shards_bucket import upload
from tests.pipeline.runs.test_bucket import BUCKET, bucket, keys_of_the_bucket
from tests.ray_cluster import ENVIRONMENT, PROGRAM, RayCluster

CLASSES, TRAIN, TEST = 20, 80, 20  # pictures of each class
PREFIX = "stand-in"
SETTINGS: dict[str, Any] = {
    "space": {"nodes": 2, "ops": ["max_pool_3x3", "skip_connect", "sep_conv_3x3"]},
    "runtime": {"threads": 1, "device": "cpu"},
}
NETWORK = {"init_channels": 4, "layers": 3}
TWO_STAGE = {
    "search": {
        **NETWORK,
        "epochs": 3,
        "batch_size": 16,
        "max_pictures": round(0.125 * CLASSES * TRAIN),
        "alpha_fraction": 0.2,
    }
}
ONE_STAGE = {
    "method": "one_stage",
    "search": {**NETWORK, "max_search_epochs": 1, "train_epochs": 2, "batch_size": 64, "max_params": None},
}
RETRAIN = {"retrain": {**NETWORK, "epochs": 2, "batch_size": 64}}


@dataclass(frozen=True)
class Job:
    """A job of the table.

    Args:
        name: "two_stage", "retrain" or "one_stage".
        source: "folder", "shards" or "bucket".
        workers: Number of Ray workers; 0 for this process.
    """

    name: str
    source: str
    workers: int = 0

    @property
    def kind(self) -> str:
        """The command."""
        return "retrain" if self.name == "retrain" else "search"

    @property
    def run_name(self) -> str:
        """The name of its run, of its configuration and of its other files."""
        return f"{self.name}-{self.source}-{self.workers}"

    @property
    def reference(self) -> Job:
        """The same job from the folder, with as many workers."""
        return Job(self.name, "folder", self.workers)


JOBS = (
    Job("two_stage", "folder"),
    Job("two_stage", "shards"),
    Job("retrain", "folder"),
    Job("retrain", "shards"),
    Job("one_stage", "folder"),
    Job("one_stage", "shards"),
    Job("two_stage", "folder", 2),
    Job("two_stage", "shards", 2),
    Job("two_stage", "bucket", 2),
)
KILLED = frozenset({Job("two_stage", "shards"), Job("retrain", "shards"), Job("two_stage", "bucket", 2)})
TABLE = Path("table.csv")


# ---------- input
def write_pictures(root: Path) -> Path:
    """Write the picture folder, if it is missing. Each class has a texture of its own below the noise."""
    if root.is_dir():
        return root
    new, number = root.with_suffix(".new"), 0
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            folder = new / split / f"class{label:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                size = 100 + 16 * (number % 11), 90 + 14 * (number % 13)
                mixed = Image.blend(picture(number, *size), picture(100_000 + label, *size), 0.5)
                mixed.save(folder / f"{i}.jpg", quality=90)
                number += 1
    return new.rename(root)


@contextlib.contextmanager
def cluster_with_bucket(shards: Path) -> Iterator[RayCluster]:
    """Provide a Ray cluster with two cores, whose workers find a bucket with the shards."""
    with bucket() as server:
        upload(server, shards, PREFIX)
        cluster = RayCluster(2, keys_of_the_bucket())
        try:
            yield cluster
        finally:
            cluster.close()


# ---------- jobs
def write_config(job: Job) -> Path:
    data = {"name": "folder" if job.source == "folder" else "webdataset", "image_size": 96}
    root = {"folder": "pictures", "shards": "shards", "bucket": f"s3://{BUCKET}/{PREFIX}"}[job.source]
    settings = {
        **SETTINGS,
        **{"two_stage": TWO_STAGE, "one_stage": ONE_STAGE, "retrain": RETRAIN}[job.name],
        "data": {**data, "root": root, "horizontal_flip": True},
        "tracking": {"name": job.run_name, "enabled": False},
    }
    file = Path(f"{job.run_name}.yaml")
    file.write_text(dump(settings))
    return file


def run_of(job: Job) -> Path | None:
    """Return the run directory of a job; None before its first start."""
    return next(Path("runs").glob(f"{job.run_name}-{job.kind}-*"), None)


def is_finished(job: Job) -> bool:
    run = run_of(job)
    return run is not None and (run / "run.json").exists() and RunDir(run).read().status == "FINISHED"


def epochs_of(job: Job) -> int:
    """Return the number of epochs that a job has stored."""
    run = run_of(job)
    stored = [] if run is None else [f.name for f in (run / CHECKPOINTS).glob("*.json")]
    return max(
        (int(found[1]) for name in stored if (found := CHECKPOINT_MANIFEST.fullmatch(name))), default=0
    )


def command(job: Job, address: str | None) -> list[str]:
    arguments = [job.kind, "--config", str(write_config(job))]
    if job.kind == "retrain":
        searched = run_of(Job("two_stage", "folder"))
        assert searched is not None
        arguments += ["--genotype", str(searched / GENOTYPE_FILE)]
    if job.workers:
        assert address is not None
        arguments += ["--workers", str(job.workers), "--address", address]
    return [*PROGRAM, *arguments]


def run(job: Job, address: str | None, environment: Mapping[str, str]) -> None:
    """Run a job, or resume it. A job of `KILLED` is killed once, after its first epoch."""
    note = Path(f"{job.run_name}.killed")
    with open(f"{job.run_name}.log", "ab") as log:
        if job in KILLED and not note.exists():
            process = subprocess.Popen(command(job, address), stdout=log, stderr=log, env=environment)
            while epochs_of(job) == 0 and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.wait()
            if is_finished(job) or epochs_of(job) == 0:
                raise SystemExit(f"{job.run_name} was not killed in its second epoch, see {log.name}")
            note.write_text(f"after epoch {epochs_of(job)}")
        subprocess.run(command(job, address), stdout=log, stderr=log, env=environment, check=True)


def equals(job: Job, reference: Job) -> bool:
    """Return whether two runs have the same weights, optimisers, codes and figures, bit for bit."""
    runs = [run_of(each) for each in (job, reference)]
    one, other = (run for run in runs if run is not None)
    files = [(one / name, other / name) for name in (GENOTYPE_FILE, WEIGHTS_FILE)]
    same = all(a.read_bytes() == b.read_bytes() for a, b in files if a.exists() or b.exists())
    found = bits(one)
    return same and found is not None and found == bits(other)


def row(job: Job, seconds: float) -> dict[str, str]:
    note = Path(f"{job.run_name}.killed")
    return {
        "run": job.run_name,
        "killed": note.read_text() if note.exists() else "",
        "seconds": f"{seconds:.0f}",
        "equal": str(equals(job, job.reference)) if job != job.reference else "",
    }


def read_rows() -> dict[str, dict[str, str]]:
    """Return the rows of an earlier call, by the name of the run."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def write_rows(rows: Sequence[dict[str, str]]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of pictures, shards, runs and the table")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    with contextlib.chdir(out), contextlib.ExitStack() as stack:
        pictures = write_pictures(Path("pictures"))
        packed = pack_folder(pictures, Path("shards"), PackSettings(2_000_000), cache_dir=Path("cache"))
        print(
            f"{packed.pictures:,} pictures, {packed.classes} classes, {packed.shards} shards, {packed.bytes:,} bytes"
        )
        environment, address = {**ENVIRONMENT, "XDG_CACHE_HOME": str(out / "cache")}, None
        before = read_rows()
        for job in JOBS:
            if is_finished(job) and job.run_name in before:
                rows.append(row(job, float(before[job.run_name]["seconds"])))
            else:
                if job.workers and address is None:
                    cluster = stack.enter_context(cluster_with_bucket(Path("shards")))
                    address, environment = cluster.address, {**environment, **keys_of_the_bucket()}
                began = time.perf_counter()
                run(job, address, environment)
                rows.append(row(job, time.perf_counter() - began))
            write_rows(
                [*rows, *(before[each.run_name] for each in JOBS[len(rows) :] if each.run_name in before)]
            )
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items() if value), flush=True)
    print(f"CPU seconds of this process and of its commands, without Ray: {cpu_seconds():.0f}")
    return 1 if any(each["equal"] == "False" for each in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
