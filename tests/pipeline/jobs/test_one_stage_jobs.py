"""A one-stage search as a job: exact resumption in both phases, the absorbed network's test figures, its files."""

import dataclasses
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from istanas.data import ArrayPictures, ImageDataset, load_dataset, normalize, stratified_subset
from istanas.errors import CheckpointError, ConfigError
from istanas.measure import count_params
from istanas.nets import TargetNet
from istanas.search import CLOSING_EPOCHS
from istanas.space import Genotype
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.search import run_search
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import load_network
from pipeline.training.epoch_record import EpochRecord, FolderStore, load_progress
from pipeline.training.loop import search_worker, searched_network
from pipeline.training.splits import splits_of
from tests.pipeline.training.small_jobs import Nobody, Watcher, all_records, decided, weights_of, with_train
from tests.ranks import run_ranks

TINY = [
    "method=one_stage",
    "space.nodes=2",
    "search={max_search_epochs: 2, train_epochs: 3, batch_size: 128, init_channels: 2, layers: 3, arch_lr: 0.05,"
    " lr: 0.1, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2, test_every: 2}",
    "data.crop_padding=1",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]
N_EPOCHS = 2 + CLOSING_EPOCHS + 3


def tiny(*overrides: str) -> Config:
    config = load(None, [*TINY, *overrides])
    assert config.method == "one_stage"
    return config


@pytest.fixture(scope="module")
def few() -> ImageDataset:
    digits = load_dataset("digits")
    chosen = stratified_subset(digits.train.labels, 300, seed=0)
    assert isinstance(digits.train, ArrayPictures)
    return with_train(digits, digits.train.images[chosen], digits.train.labels[chosen])


def search(
    config: Config, dataset: ImageDataset, folder: Path, watcher: Watcher | None = None
) -> list[EpochRecord]:
    return all_records(folder, search_worker(config, dataset, FolderStore(folder), watcher or Watcher()))


@pytest.fixture(scope="module")
def whole(few: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EpochRecord], TargetNet]:
    """History and network of an undisturbed search."""
    folder = tmp_path_factory.mktemp("whole")
    history = search(tiny(), few, folder)
    return history, searched_network(tiny(), few, folder, N_EPOCHS)


def test_it_searches_then_trains(whole: tuple[list[EpochRecord], TargetNet]) -> None:
    history, _ = whole
    assert [record.found().searching for record in history] == [True, True, False, False, False, False]
    assert [record.metrics["arch/frozen_nodes"] for record in history][1:] == [4.0] * 5
    assert len({record.found().genotype for record in history[1:]}) == 1, "a fixed architecture changed"
    assert ["recovery/gap" in record.metrics for record in history] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    # Tested in training, after every second epoch and at the end; never while searching.
    assert ["test/top1" in record.metrics for record in history] == [False] * 4 + [True, True]
    frozen = history[-1].found().frozen
    assert frozen is not None
    assert len(frozen) == 4
    assert {freezing.epoch for freezing in frozen} <= {1, 2}
    assert {freezing.reason for freezing in frozen} <= {"tolerance", "limit"}


@pytest.mark.parametrize("stop_at", [(0, 2), (1, 3), (2, 1), (3, 1), (4, 2)])
def test_a_search_stopped_in_either_phase_equals_an_undisturbed_one(
    few: ImageDataset, tmp_path: Path, whole: tuple[list[EpochRecord], TargetNet], stop_at: tuple[int, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tiny(), few, tmp_path, Watcher(stop_at=stop_at))
    watcher = Watcher()
    history = search(tiny(), few, tmp_path, watcher)
    assert watcher.resumed_with == [(stop_at[0], 1)]
    assert decided(history) == decided(whole[0])
    assert weights_of(searched_network(tiny(), few, tmp_path, N_EPOCHS)) == weights_of(whole[1])
    again = Watcher()
    assert search(tiny(), few, tmp_path, again) == history
    assert again.steps == [], "a finished job trained on"


def on_a_rank(dataset: ImageDataset, folder: Path, leave_after: tuple[int, ...]) -> list[EpochRecord]:
    if torch.distributed.get_rank() > 0:
        nobody: Any = Nobody()
        return [search_worker(tiny(), dataset, nobody, nobody).newest]
    return search(tiny(), dataset, folder, Watcher(leave_after=leave_after))


def test_on_two_ranks_with_a_stop_in_each_phase(few: ImageDataset, tmp_path: Path) -> None:
    cut, straight = tmp_path / "cut", tmp_path / "straight"
    parts = run_ranks(
        [
            partial(on_a_rank, few, cut, (1,)),
            partial(on_a_rank, few, cut, (4,)),
            partial(on_a_rank, few, cut, ()),
            partial(on_a_rank, few, straight, ()),
        ],
        2,
    )
    first, second, third, never = ([outcome.value for outcome in outcomes] for outcomes in parts)
    assert [len(outcomes[0]) for outcomes in (first, second, third)] == [1, 4, 6]
    assert decided(third[0]) == decided(never[0])
    assert decided(third[0][-1:]) == decided(third[1])
    nets = [weights_of(searched_network(tiny(), few, folder, N_EPOCHS)) for folder in (cut, straight)]
    assert nets[0] == nets[1]


def test_the_test_figures_are_those_of_the_absorbed_network(
    few: ImageDataset, whole: tuple[list[EpochRecord], TargetNet]
) -> None:
    history, net = whole
    assert isinstance(few.test, ArrayPictures)
    assert not net.training
    logits = net(normalize(few.test.images, few.mean, few.std))
    top1 = (logits.argmax(1) == few.test.labels).double().mean().item()
    assert top1 == pytest.approx(history[-1].metrics["test/top1"], abs=1e-12)
    assert history[-1].metrics["target/params"] == count_params(net)


def test_neither_test_nor_holdout_pictures_change_the_network(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny("data.holdout=0.2", "search.train_epochs=1")
    kept = splits_of(config, few, "search").holdout
    assert kept is not None
    assert isinstance(few.train, ArrayPictures)
    assert isinstance(few.test, ArrayPictures)
    images = few.train.images.clone()
    images[kept] = 255 - images[kept]
    other = dataclasses.replace(
        with_train(few, images, few.train.labels),
        test=ArrayPictures(255 - few.test.images, few.test.labels.flip(0)),
    )
    results = []
    for name, dataset in (("plain", few), ("other", other)):
        history = search(config, dataset, tmp_path / name)
        net = searched_network(config, dataset, tmp_path / name, 4)
        results.append((weights_of(net), history[-1].metrics))
    assert results[0][0] == results[1][0]
    assert results[0][1]["valid/loss"] != results[1][1]["valid/loss"]
    assert results[0][1]["test/loss"] != results[1][1]["test/loss"]


def test_a_part_of_the_pictures(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    search(tiny("search.max_pictures=100", "search.train_epochs=0"), few, tmp_path, watcher)
    assert watcher.counts == {0: 100, 1: 100, 2: 100}
    assert watcher.last is not None
    assert "test/top1" in watcher.last.metrics, "without training, the search's end is measured"
    with pytest.raises(
        ConfigError, match=r"search\.max_pictures: 301 is above the 300 available pictures; lower it"
    ):
        splits_of(tiny("search.max_pictures=301"), few, "search")


def test_limits_without_an_architecture_are_a_one_line_error(few: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^search.max_params: .* parameters are above max_params = 10, and 100 other"
    ) as caught:
        search(tiny("search.max_params=10"), few, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_two_stage_checkpoint_is_refused_by_a_one_stage_search(few: ImageDataset, tmp_path: Path) -> None:
    two_stage = load(None, [*TINY[1:2], *TINY[3:], "search={epochs: 1, init_channels: 2, layers: 3}"])
    search_worker(two_stage, few, FolderStore(tmp_path), Watcher())
    with pytest.raises(CheckpointError, match="'two_stage' version 2 is not 'one_stage' version 2"):
        search(tiny(), few, tmp_path)
    with pytest.raises(CheckpointError, match="'two_stage'"):
        searched_network(tiny(), few, tmp_path, 1)


def test_an_unfinished_search_has_no_network(few: ImageDataset, tmp_path: Path) -> None:
    search(tiny(), few, tmp_path, Watcher(leave_after=(1,)))
    with pytest.raises(ConfigError, match="is still ACTIVE"):
        searched_network(tiny(), few, tmp_path, 1)
    with pytest.raises(CheckpointError, match="the last epoch's checkpoint is missing or damaged"):
        searched_network(tiny(), few, tmp_path, N_EPOCHS)


# ---------- the run directory
def test_the_files_of_a_search(tmp_path: Path) -> None:
    config = tiny(f"runtime.runs_dir={tmp_path}", "search.max_pictures=200")
    out = io.StringIO()
    with Runtime(config.runtime) as runtime:
        result: Any = run_search(JobContext(config, "tiny", Console(file=out, width=200), runtime))
    path = Path(result["run_dir"])
    record = RunDir(path).read()
    assert (record.status, record.kind, record.method) == ("FINISHED", "search", "one_stage")
    for name in record.artifacts:
        assert (path / name).stat().st_size > 0, name
    assert {"freezing.png", "freezing.svg", "model.safetensors", "network.json"} <= set(record.artifacts)
    net, _ = load_network(path)
    trained = searched_network(config, load_dataset("digits"), path / "checkpoints", N_EPOCHS).state_dict()
    for key, value in net.state_dict().items():  # the auxiliary head is not among the files
        assert torch.equal(value, trained[key]), key
    assert count_params(net) == result["params"]
    assert (result["search_epochs"], result["train_epochs"], result["rejected"]) == (3, 3, 0)
    assert [
        (f["cell"], f["node"]) for f in sorted(result["frozen"], key=lambda f: (f["cell"], f["node"]))
    ] == [
        ("normal", 0),
        ("normal", 1),
        ("reduce", 0),
        ("reduce", 1),
    ]
    for freezing in result["frozen"]:
        row = f"| {freezing['cell']} {freezing['node']} | {freezing['epoch']} | {freezing['reason']} |"
        assert row in record.description
    assert Genotype.from_json((path / "genotype.json").read_text()).to_dict() == result["genotype"]
    last = load_progress(path / "checkpoints").newest
    assert json.loads(last.found().genotype) == result["genotype"]
    assert "architecture fixed after 2 epochs" in out.getvalue()
    epochs = {line.split(",")[0] for line in (path / "trajectory.csv").read_text().splitlines()[1:]}
    assert epochs == {"0", "1", "2"}, "the trajectory ends with the search"


def test_a_rejected_architecture_is_reported_and_counted(tmp_path: Path) -> None:
    """The limit is just below the largest architecture of the same search without a limit."""
    overrides = [
        "search.max_pictures=200",
        "search.max_search_epochs=6",
        "search.train_epochs=0",
        "search.arch_lr=0.3",
        "search.batch_size=64",
    ]
    unlimited = tiny(f"runtime.runs_dir={tmp_path / 'a'}", *overrides)
    out = io.StringIO()

    def run(config: Config) -> Any:
        with Runtime(config.runtime) as runtime:
            return run_search(JobContext(config, "tiny", Console(file=out, width=200), runtime))

    run(unlimited)
    lines = RunDir(next((tmp_path / "a").iterdir())).metrics()
    sizes = [line.metrics["target/params"] for line in lines]
    assert max(sizes) > min(sizes), "the sizes never change here: choose another seed"
    limit = int(max(sizes)) - 1
    result = run(tiny(f"runtime.runs_dir={tmp_path / 'b'}", f"search.max_params={limit}", *overrides))
    assert result["params"] <= limit
    assert result["rejected"] == out.getvalue().count("rejected the new architecture") > 0
    assert f"parameters are above max_params = {limit:,}" in out.getvalue()
    last = RunDir(Path(result["run_dir"])).metrics()[-1].metrics
    assert last["arch/rejected"] == result["rejected"]
