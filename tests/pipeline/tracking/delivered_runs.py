"""Run directories, and what a store has of them, for the tests of the tracker."""

import dataclasses
from pathlib import Path

import torch
from mlflow import MlflowClient

from istanas.data import Preprocessing
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import NetworkCard
from pipeline.runs.record import RunRecord, new_key
from pipeline.tracking import tracker as tracking
from pipeline.tracking.notices import Notices
from pipeline.tracking.tracker import MLflowTracker

RECORD = RunRecord(
    name="digits-search",
    kind="search",
    method="two_stage",
    dataset="digits",
    key="",
    params={"seed": 0, "search.lr": 0.1, "data.root": None, "flip": True},
    tags={"istanas.genotype": "0123abcd"},
    description="# Found\n\na cell",
    parent=None,
    status="RUNNING",
    started_ms=1_700_000_000_000,
    ended_ms=None,
    artifacts=("config.yaml", "cells/normal.svg", "never_written.json"),
    result={},
)

EXPERIMENT = "tests"


def make_run(path: Path, epochs: int = 2, **changes: object) -> RunDir:
    run = RunDir(path)
    run.write(dataclasses.replace(RECORD, **{"key": new_key(), **changes}))  # type: ignore[arg-type]
    (path / "cells").mkdir()
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "cells" / "normal.svg").write_text("<svg/>")
    add_epochs(run, 1, epochs)
    return run


def add_epochs(run: RunDir, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        run.append_metrics(epoch, {"train/loss": 1 / epoch, "valid/top1": epoch / 100}, 1000 * epoch)


def end_run(run: RunDir, status: str = "FINISHED", **changes: object) -> None:
    ended = {"status": status, "ended_ms": 1_700_000_060_000, "result": {"seconds": 42.5}, **changes}
    run.write(dataclasses.replace(run.read(), **ended))  # type: ignore[arg-type]


def tracker_of(run: RunDir, store: str) -> MLflowTracker:
    return MLflowTracker(run, tracking_uri=store, experiment=EXPERIMENT, notices=Notices())


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name)]


def runs_of(client: MlflowClient, run: RunDir) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`istanas.key` = '{run.read().key}'")
    return [entity.info.run_id for entity in found]


def picture(run_id: str) -> str:
    """The normal cell as a description shows it."""
    return f"![normal cell](get-artifact?path=cells/normal.svg&run_uuid={run_id})"


def small_network(path: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network with batch norm, of weights that a test has saved in the run directory."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    network.load_state_dict(torch.load(path / "weights.pt", weights_only=True))
    return network.eval(), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def save_small_network(path: Path) -> None:
    torch.manual_seed(0)
    blank = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    blank(torch.rand(32, 1, 8, 8))  # running statistics that differ from the initial ones
    torch.save(blank.state_dict(), path / "weights.pt")
    steps = Preprocessing(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    card = NetworkCard("{}", 4, 1, 10, "cifar", False, steps, tuple("0123456789"))
    (path / "network.json").write_text(card.to_json())


def trained_run(path: Path, **changes: object) -> RunDir:
    """A finished one-stage search with a network."""
    run = make_run(path, **{"method": "one_stage", "name": path.name, **changes})  # type: ignore[arg-type]
    save_small_network(run.path)
    end_run(run)
    return run


def registering(run: RunDir, store: str, name: str | None) -> MLflowTracker:
    return MLflowTracker(
        run, tracking_uri=store, experiment=EXPERIMENT, registered_model=name, load_network=small_network
    )


def delivered(tracker: MLflowTracker) -> tracking.Delivery:
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    return tracker.last_delivery


def candidate(client: MlflowClient, name: str) -> int:
    return int(client.get_model_version_by_alias(name, "candidate").version)
