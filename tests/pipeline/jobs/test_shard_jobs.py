"""The whole ImageNet path on 20 classes: shards and a bucket give the bits of the folder, also after a kill."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from istanas.data import load_dataset
from istanas.data.shard_files import FolderShards
from istanas.space import Genotype
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.training.epoch_record import EpochRecord
from pipeline.training.loop import search_worker, trained_network
from pipeline.training.pictures import open_dataset, settle_stems
from pipeline.training.splits import splits_of
from tests.istanas.data.test_shards import packed_into, write_pictures
from tests.istanas.data.test_shards_bucket import upload
from tests.pipeline.runs.test_bucket import BUCKET, Server, bucket
from tests.pipeline.training.small_jobs import Nobody, Watcher, decided, retrain, search, weights_of
from tests.ranks import run_ranks

CLASSES = 20
SUBSET = 60  # of 80 training pictures
SETTINGS = [
    "space={nodes: 2, ops: [max_pool_3x3, skip_connect, sep_conv_3x3]}",
    "data={image_size: 65, horizontal_flip: true}",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]
TWO_STAGE = [f"search={{epochs: 2, batch_size: 16, init_channels: 2, layers: 3, max_pictures: {SUBSET}}}"]
ONE_STAGE = [
    "method=one_stage",
    "search={max_search_epochs: 1, train_epochs: 1, batch_size: 32, init_channels: 2, layers: 3}",
]
RETRAIN = ["retrain={epochs: 2, batch_size: 32, init_channels: 2, layers: 3}"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_pictures(tmp_path_factory.mktemp("path") / "pictures", classes=CLASSES, train=4, test=1)
    packed_into(root, root.parent / "shards")
    return root


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bucket() as server:
        yield server


def config_of(root: Path | str, *settings: str) -> Config:
    name = "folder" if str(root).endswith("pictures") else "webdataset"
    given = [*SETTINGS, *settings, f"data.name={name}", f"data.root={root}"]
    return settle_stems(load(None, given))


def searched(
    root: Path | str, folder: Path, *settings: str, killed_at: tuple[int, int] | None = None
) -> list[EpochRecord]:
    """Run a search; with `killed_at`, it is stopped in that epoch and step, and started again."""
    config = config_of(root, *settings)
    if killed_at is not None:
        with pytest.raises(KeyboardInterrupt):
            search(config, open_dataset(config, ["search"]), folder, Watcher(stop_at=killed_at))
    return decided(search(config, open_dataset(config, ["search"]), folder))


def test_both_stages_give_the_bits_of_the_folder(pictures: Path, server: Server, tmp_path: Path) -> None:
    shards = pictures.parent / "shards"
    upload(server, shards, "jobs")  # All modules share the bucket.
    whole = searched(pictures, tmp_path / "folder", *TWO_STAGE)
    assert searched(shards, tmp_path / "shards", *TWO_STAGE, killed_at=(1, 2)) == whole
    assert searched(f"s3://{BUCKET}/jobs", tmp_path / "s3", *TWO_STAGE, killed_at=(0, 1)) == whole

    genotype = Genotype.from_json(whole[-1].found().genotype)
    weights = []
    for root, killed_at in ((pictures, None), (shards, (1, 1))):
        config, folder = config_of(root, *RETRAIN), tmp_path / root.name / "retrained"
        dataset = open_dataset(config, ["retrain"])
        if killed_at is not None:
            with pytest.raises(KeyboardInterrupt):
                retrain(config, dataset, folder, Watcher(stop_at=killed_at), genotype)
        retrain(config, dataset, folder, genotype=genotype)
        weights.append(weights_of(trained_network(config, genotype, dataset, folder)))
    assert weights[0] == weights[1]


def test_one_stage_gives_the_bits_of_the_folder(pictures: Path, tmp_path: Path) -> None:
    shards = pictures.parent / "shards"
    whole = searched(pictures, tmp_path / "folder", *ONE_STAGE)
    assert searched(shards, tmp_path / "shards", *ONE_STAGE, killed_at=(1, 1)) == whole


def on_a_rank(root: Path, folder: Path, leave_after: tuple[int, ...]) -> list[EpochRecord]:
    config = config_of(root, *TWO_STAGE)
    dataset = open_dataset(config, ["search"])
    if torch.distributed.get_rank() > 0:
        nobody = Nobody()
        search_worker(config, dataset, nobody, nobody)  # type: ignore[arg-type]
        return []
    return decided(search(config, dataset, folder, Watcher(leave_after=leave_after)))


def test_two_ranks_give_the_bits_of_the_folder(pictures: Path, tmp_path: Path) -> None:
    shards = pictures.parent / "shards"
    parts = run_ranks(
        [
            partial(on_a_rank, pictures, tmp_path / "folder", ()),
            partial(on_a_rank, shards, tmp_path / "shards", (1,)),
            partial(on_a_rank, shards, tmp_path / "shards", ()),
        ],
        2,
    )
    whole, _, resumed = (outcomes[0].value for outcomes in parts)
    assert resumed == whole


def test_subsets_and_halves_follow_from_the_index(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 % and 2.5 % in the literature; here three quarters, of which half train the alphas."""
    config = config_of(pictures.parent / "shards", *TWO_STAGE, "data.holdout=0.1")
    files = load_dataset("folder", root=pictures, image_size=65, cache_dir=tmp_path)
    shards = open_dataset(config, ["search"])

    def unexpected(*arguments: object) -> bytes:
        raise AssertionError(f"a shard was read: {arguments}")

    monkeypatch.setattr(FolderShards, "read", unexpected)
    one, other = splits_of(config, files, "search"), splits_of(config, shards, "search")
    for name in ("training", "alphas", "holdout"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert len(other.training) + len(other.alpha_half()) == SUBSET
