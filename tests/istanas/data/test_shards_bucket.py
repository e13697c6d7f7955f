"""Shards on `s3://`, tested with a local S3 server (moto)."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from istanas.data import load_dataset, shard_files
from istanas.errors import ConfigError, DataError
from pipeline.config.load import load as load_config
from pipeline.config.load import run_hash
from pipeline.training.pictures import data_are_missing, load_pictures
from tests.istanas.data.test_shards import (
    assert_equal,
    epoch_of,
    load,
    loader_of,
    packed_into,
    write_pictures,
)
from tests.pipeline.runs.test_bucket import BUCKET, Server, bucket

ADDRESS = f"s3://{BUCKET}/shards"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bucket() as server:
        yield server


@pytest.fixture(scope="module")
def packed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in a folder and in the bucket."""
    out = tmp_path_factory.mktemp("bucket") / "shards"
    packed_into(write_pictures(out.parent / "pictures"), out)
    upload(server, out, "shards")
    return out


def upload(server: Server, out: Path, prefix: str) -> None:
    for file in out.rglob("*"):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(out).as_posix()}"
            server.client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_the_batches_of_the_folder(packed: Path, workers: int) -> None:
    here, there = load(packed), load_dataset("webdataset", root=ADDRESS, image_size=66)
    assert there.digest == here.digest
    assert there.train.paths[0].startswith(f"{ADDRESS}/train/shard-")  # type: ignore[union-attr]
    assert_equal(epoch_of(there, workers=workers), epoch_of(here))


def test_small_pictures_are_read_from_a_bucket(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load(packed, size=32)
    there = load_dataset("webdataset", root=ADDRESS, image_size=32, cache_dir=tmp_path / "cache")
    assert torch.equal(here.train.images, there.train.images)  # type: ignore[union-attr]
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.chdir(tmp_path)  # the cache of a bucket does not depend on the working directory
    monkeypatch.setattr(shard_files.Members, "batches", None)
    load_dataset("webdataset", root=f"{ADDRESS}/", image_size=32, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [cached]


def test_a_bucket_that_goes_away_ends_the_epoch_with_a_line(
    server: Server, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is the same when the bucket is back.

    Without data workers, which would inherit the server's socket from this process. They never use the bucket.
    """
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.0)
    dataset = load_dataset("webdataset", root=ADDRESS, image_size=66)
    loader = loader_of(dataset, batch_size=2, augmentation=None)
    passing = iter(loader)
    first = [next(passing)]
    server.stop()
    try:
        with pytest.raises(DataError, match=rf"{ADDRESS}/train/shard-\d+\.tar cannot be read \(.*") as caught:
            first.extend(passing)
    finally:
        server.start()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; check network, credentials and bucket; the same command resumes")
    again = list(loader)
    assert 1 <= len(first) < len(again) == 12
    assert_equal([(b.images, b.labels) for b in first], [(b.images, b.labels) for b in again[: len(first)]])


def test_a_short_outage_is_waited_for(server: Server, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = shard_files.BucketShards(ADDRESS)
    expected = storage.read("train/shard-000000.tar", 0, 100)
    monkeypatch.setattr(
        time, "sleep", lambda seconds: server.start()
    )  # the server is back when a request is repeated
    server.stop()
    assert storage.read("train/shard-000000.tar", 0, 100) == expected


def test_a_bucket_that_cannot_be_used_is_named(server: Server, packed: Path) -> None:
    with pytest.raises(
        DataError, match=r"s3://bucket/nothing has no index\.parquet; complete it with istanas pack"
    ):
        load_dataset("webdataset", root=f"s3://{BUCKET}/nothing", image_size=66)
    with pytest.raises(
        DataError, match=r"s3://nobody/shards/index\.parquet cannot be read|s3://nobody/shards has no"
    ):
        load_dataset("webdataset", root="s3://nobody/shards", image_size=66)
    with pytest.raises(
        ConfigError, match=r"data\.root: 's3://bucket/pictures' is not a folder, and folder is read"
    ):
        load_dataset("folder", root=f"s3://{BUCKET}/pictures")
    with pytest.raises(
        ConfigError, match=r"data\.root: 's3://bucket/pictures' is not a folder, and folder is read"
    ):
        load_config(None, ["data.name=folder", f"data.root=s3://{BUCKET}/pictures"])
    with pytest.raises(ConfigError, match=r"data\.root: .* contains a password or key"):
        load_config(None, ["data.name=webdataset", "data.root=s3://key:secret@bucket/shards"])
    key = "train/shard-000001.tar"
    content = (packed / key).read_bytes()
    server.client.put_object(Bucket=BUCKET, Key=f"shards/{key}", Body=content[:9_000])
    with pytest.raises(DataError, match=rf"{ADDRESS}/{key} is truncated: it has 9,000 bytes"):
        load_dataset("webdataset", root=ADDRESS, image_size=66)
    server.client.put_object(Bucket=BUCKET, Key=f"shards/{key}", Body=content)


def test_only_a_bucket_out_of_reach_counts_as_missing(
    server: Server, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a finished run is then shown with a warning, and a changed shard is an error."""
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.0)

    def is_missing(address: str) -> bool:
        data = load_config(None, ["data={name: webdataset, image_size: 66}", f"data.root={address}"]).data
        with pytest.raises(DataError) as caught:
            load_pictures(data)
        return data_are_missing(data, caught.value)

    key = "shards/train/shard-000000.tar"
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    assert not is_missing(ADDRESS)
    server.client.delete_object(Bucket=BUCKET, Key=key)
    assert not is_missing(ADDRESS)
    server.client.put_object(Bucket=BUCKET, Key=key, Body=(packed / key.partition("/")[2]).read_bytes())
    assert is_missing(f"s3://{BUCKET}/nothing")
    assert is_missing("s3://nobody/shards")


def test_the_run_directory_follows_from_the_address() -> None:
    one, same, other = (
        load_config(None, ["data.name=webdataset", f"data.root=s3://{BUCKET}/{name}"])
        for name in ("shards", "shards/", "others")
    )
    alias = load_config(None, ["data.name=shards", f"data.root=s3://{BUCKET}/shards"])
    assert run_hash(one, "search") == run_hash(same, "search") != run_hash(other, "search")
    assert run_hash(alias, "search") == run_hash(one, "search")
