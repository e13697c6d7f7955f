"""The trained network of a run in MLflow: the logged model with its metrics, and its version in the model registry.

All functions use an explicit client and are safe to repeat, even after a crash at any point.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runs.directory import RunDir
from pipeline.runs.layout import PROGRAM_FILE
from pipeline.runs.record import RunRecord
from pipeline.runs.tags import Tag
from pipeline.tracking.lineage import DESCRIPTION, Kin, lineage_tags, with_links

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

MODEL_NAME = "model"
CANDIDATE = "candidate"  # alias of the newest version of a registered model
CHAMPION = "champion"  # alias of the version that `istanas promote` chose
FIGURES = (
    "train/loss",
    "train/top1",
    "train/top5",
    "valid/loss",
    "valid/top1",
    "valid/top5",
    "test/loss",
    "test/top1",
    "test/top5",
    "target/params",
    "target/macs",
)
"""Metrics of a run whose last values are also metrics of its model."""

NetworkLoader = Callable[[Path], "tuple[torch.nn.Module, torch.Tensor]"]


class UnusableNetworkError(Exception):
    """A run's network cannot be loaded or written in MLflow's format."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def registered_name(wanted: str | None, record: RunRecord) -> str:
    """Return the name of the registered model of a run's network.

    Args:
        wanted: The setting `tracking.registered_model`.
        record: The record of the run.
    """
    return wanted if wanted is not None else f"istanas-{record.data_label}"


def log_model(
    client: "MlflowClient", run: "Run", run_dir: RunDir, load_network: NetworkLoader
) -> "tuple[LoggedModel, bool]":
    """Log the trained network as the MLflow model "model" of its run, unless it was logged before.

    This does not use `mlflow.pytorch.log_model`, which writes to the process's global store.

    Args:
        client: A client of the store.
        run: The MLflow run, with its metrics.
        run_dir: The run directory that the MLflow run mirrors.
        load_network: Loads the network in eval mode and example pictures (2, C, H, W) from a run directory.

    Returns:
        The model, and whether this call logged it.

    Raises:
        UnusableNetworkError: the network cannot be loaded.
    """
    from mlflow.entities import LoggedModelStatus

    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    query = f"source_run_id = '{run_id}' AND name = '{MODEL_NAME}'"
    there = list(client.search_logged_models([experiment_id], query))
    model = next((model for model in there if model.status == LoggedModelStatus.READY), None)
    new = model is None
    if model is None:
        for unfinished in there:
            client.delete_logged_model(unfinished.model_id)
        model = _create_model(client, run, run_dir, load_network)
    _link_model(client, run_id, model.model_id, run_dir)
    _log_figures(client, run_id, model, run_dir)
    return model, new


def register(
    client: "MlflowClient", name: str, model: "LoggedModel", record: RunRecord, kin: Sequence[Kin]
) -> tuple[int, bool]:
    """Register the model, unless it is registered already, and move the alias `candidate` to the newest version.

    Args:
        client: A client of the store.
        name: The name of the registered model, which is created if it does not exist.
        model: The logged model.
        record: The record of its run.
        kin: The run and its ancestors, the nearest first.

    Returns:
        The version, and whether this call created it.
    """
    _describe_model(client, model, record, kin)
    version, new = _model_version(client, name, model, record, kin)
    _link_version(client, model.model_id, version)
    _point_candidate(client, name)
    return int(version.version), new


def _create_model(
    client: "MlflowClient", run: "Run", run_dir: RunDir, load_network: NetworkLoader
) -> "LoggedModel":
    from mlflow.entities import LoggedModelStatus

    record = run_dir.read()
    with tempfile.TemporaryDirectory() as scratch:
        logged = client.create_logged_model(
            run.info.experiment_id,
            name=MODEL_NAME,
            source_run_id=run.info.run_id,
            params={name: str(value) for name, value in record.params.items()},
            tags=record.tags,
            model_type="classifier",
        )
        try:
            _save_model(scratch, load_network, run_dir.path, logged)
        except Exception as error:  # missing or damaged files, or a network that cannot be exported
            client.delete_logged_model(logged.model_id)
            raise UnusableNetworkError(error) from error
        client.log_model_artifacts(logged.model_id, f"{scratch}/{MODEL_NAME}")
    return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def _link_model(client: "MlflowClient", run_id: str, model_id: str, run_dir: RunDir) -> None:
    """Make the model an output of its run, unless it is one already."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if outputs is not None and any(output.model_id == model_id for output in outputs.model_outputs):
        return
    last_step = max((line.step for line in run_dir.metrics()), default=0)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=last_step)])


def _log_figures(client: "MlflowClient", run_id: str, model: "LoggedModel", run_dir: RunDir) -> None:
    """Log the run's last metrics as metrics of the model, each with its data set, unless they were logged before."""
    from mlflow.entities import Metric

    record = run_dir.read()
    logged = {metric.key for metric in model.metrics or ()}
    measured = {name for line in run_dir.metrics() for name in line.metrics}
    figures = []
    for name in FIGURES:
        if name in logged or name not in measured:
            continue
        # Value, time and step are those of the store, so that the run's own history gets no second entry.
        last = max(client.get_metric_history(run_id, name), key=lambda m: (m.step, m.timestamp))
        use = record.measured_on(name)
        figures.append(
            Metric(
                name,
                last.value,
                last.timestamp,
                last.step,
                model_id=model.model_id,
                dataset_name=use.name if use else None,
                dataset_digest=use.digest if use else None,
            )
        )
    if figures:
        client.log_batch(run_id, metrics=figures, synchronous=True)


def _description(record: RunRecord, kin: Sequence[Kin]) -> str:
    return with_links(record.description, kin, kin[0].run_id, record.artifacts)


def _describe_model(
    client: "MlflowClient", model: "LoggedModel", record: RunRecord, kin: Sequence[Kin]
) -> None:
    """Set the description and the lineage of the logged model, unless it has them already."""
    wanted = {**lineage_tags(kin), DESCRIPTION: _description(record, kin)}
    if not wanted.keys() <= model.tags.keys():
        client.set_logged_model_tags(model.model_id, wanted)


def _model_version(
    client: "MlflowClient", name: str, model: "LoggedModel", record: RunRecord, kin: Sequence[Kin]
) -> "tuple[ModelVersion, bool]":
    """Return the run's version of a registered model, and whether this call created it."""
    found = client.search_model_versions(f"run_id = '{model.source_run_id}'")
    there = [version for version in found if version.name == name]
    if there:
        return min(there, key=lambda version: int(version.version)), False
    _create_registered_model(client, name)
    version = client.create_model_version(
        name,
        # Not models:/ID, which MLflow looks up in the process's global store.
        source=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags={
            Tag.KIND: record.kind,
            Tag.METHOD: record.method,
            Tag.DATASET: record.dataset,
            **record.tags,
            **lineage_tags(kin),
        },
        description=_description(record, kin),
    )
    return version, True


def _create_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    description = (
        f"Networks trained by istanas; the alias `{CANDIDATE}` is the newest version, `{CHAMPION}` the one that "
        "`istanas promote` chose."
    )
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _link_version(client: "MlflowClient", model_id: str, version: "ModelVersion") -> None:
    """Record the version in the logged model's tags, which MLflow's pages read; an MLflow server does this itself."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    noted = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if (version.name, str(version.version)) in {(note["name"], str(note["version"])) for note in noted}:
        return
    noted.append({"name": version.name, "version": version.version})
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(noted)})


def _point_candidate(client: "MlflowClient", name: str) -> None:
    """Move the alias `candidate` to the newest version."""
    for _ in range(3):  # another run may register a version in between
        model = client.get_registered_model(name)
        newest = str(max(int(version.version) for version in model.latest_versions))
        if str(model.aliases.get(CANDIDATE)) == newest:
            return
        client.set_registered_model_alias(name, CANDIDATE, newest)


def _save_model(scratch: str, load_network: NetworkLoader, run_path: Path, logged: Any) -> None:
    """Write the network in MLflow's format: as weights, which `istanas predict` loads, and as an exported graph.

    `mlflow.pytorch.load_model` returns the network itself; `mlflow.pyfunc.load_model` and MLflow's server take pictures
    and return classes, see `pipeline.tracking.picture_model.PictureModel`.
    """
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model

    from pipeline.runs.network_files import read_card, trace_program, write_network
    from pipeline.tracking import picture_model

    network, _ = load_network(run_path)
    card = read_card(run_path)
    data = Path(scratch) / picture_model.NETWORK_FOLDER
    data.mkdir()
    program = trace_program(network.cpu().eval(), card.preprocessing.shape)
    torch.export.save(program, data / PROGRAM_FILE)
    write_network(data, network, card)
    model = Model(
        run_id=logged.source_run_id,
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        metadata={"preprocessing": card.preprocessing.to_dict(), "class_names": list(card.class_names)},
    )
    model.add_flavor(
        "pytorch", model_data=f"data/{data.name}", pytorch_version=str(torch.__version__), code=None
    )
    pyfunc.save_model(
        f"{scratch}/{MODEL_NAME}",
        loader_module=picture_model.__name__,
        data_path=str(data),
        mlflow_model=model,
        signature=picture_model.signature(),
        input_example=picture_model.example(card.preprocessing),
        # Explicit, because MLflow would infer them in a second interpreter, which takes half a minute.
        pip_requirements=picture_model.requirements(),
    )
