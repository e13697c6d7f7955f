"""The trained network as an MLflow model that takes pictures, and as a version of a registered model.

MLflow loads the model with `_load_pyfunc` of this module, also for `mlflow models serve`. A model folder contains the
network as an exported graph, which executes no pickled code when it is loaded, and its card `network.json`.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from istanas import __version__
from istanas.errors import CheckpointError, ConfigError, DataError
from pipeline.base.text import one_line
from pipeline.runs.network_files import read_card
from pipeline.runs.predictor import Predictor, open_predictor
from pipeline.tracking.queries import readable
from pipeline.tracking.store import open_client, public_uri, store_exists, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

    from istanas.data import Preprocessing

COLUMN = "picture"
NETWORK_FOLDER = "network"  # in the folder `data` of a model
REGISTERED = "models:/"
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


class PictureModel:
    """A network whose input is a table of pictures.

    Args:
        predictor: The network.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, model_input: Any, params: Any = None) -> pd.DataFrame:
        """Classify pictures.

        Args:
            model_input: A data frame whose column `picture` has one picture per row: the content of a picture file as
                bytes or as base64 text, or its pixels as a uint8 array, or nested lists, (H, W), (H, W, 1) or
                (H, W, 3).
            params: Not used; MLflow passes it.

        Returns:
            One row per picture with the index of the input: `class`, its `probability`, and `probabilities`, which maps
            each class to its own.

        Raises:
            DataError: A picture cannot be used. It names its row.
        """
        import pandas as pd

        pictures = [self._read(row, each) for row, each in enumerate(model_input[COLUMN])]
        names = self.predictor.class_names
        none = torch.zeros(0, len(names))
        values = self.predictor.probabilities(torch.stack(pictures)) if pictures else none
        rows = [dict(zip(names, row, strict=True)) for row in values.tolist()]
        best = [names[index] for index in values.argmax(1).tolist()]
        return pd.DataFrame(
            {
                "class": best,
                "probability": values.amax(1).tolist(),
                "probabilities": rows,
            },
            index=model_input.index,
        )

    def _read(self, row: int, picture: Any) -> torch.Tensor:
        steps = self.predictor.preprocessing
        try:
            if isinstance(picture, str):
                picture = base64.b64decode(
                    "".join(picture.split()), validate=True
                )  # programs wrap it in lines
            if isinstance(picture, bytes | bytearray | memoryview):
                return steps.read(bytes(picture))
            return steps.from_array(_pixels(picture))
        except DataError as error:
            problem = error.problem
        except ValueError as error:
            problem = f"it is neither base64 nor an array ({error})"
        raise DataError(problem, field=f"{COLUMN} {row}", remedy="correct it") from None


def _pixels(picture: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pixels of an array, or of nested lists as a JSON request has them."""
    if isinstance(picture, np.ndarray) and picture.dtype.kind != "O":  # pandas makes objects of nested lists
        return picture
    array = np.array(picture.tolist() if isinstance(picture, np.ndarray) else picture)
    is_bytes = array.dtype.kind == "i" and array.size > 0 and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if is_bytes else array


def signature() -> ModelSignature:
    """Return MLflow's description of the input and the output, see `PictureModel.predict`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Map

    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), COLUMN)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Map(DataType.double), "probabilities"),
            ]
        ),
    )


def example(steps: Preprocessing) -> pd.DataFrame:
    """Return an input with one white picture as a PNG in base64, as a request to MLflow's server has it."""
    import pandas as pd
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (steps.shape[2], steps.shape[1]), "white").save(content, "PNG")
    # MLflow compares the columns with a range, of which pandas warns if their type is that of strings.
    columns = pd.Index([COLUMN], dtype=object)
    return pd.DataFrame([[base64.b64encode(content.getvalue()).decode()]], columns=columns)


def requirements() -> list[str]:
    """Return the packages that a model needs where it is loaded."""
    # A submitted job runs from its working tree, where istanas itself is not installed as a distribution.
    packages = {
        "istanas": __version__,
        **{name: version(name) for name in ("pillow", "torch", "torchvision")},
    }
    return [f"{name}=={number.partition('+')[0]}" for name, number in packages.items()]


def predictor_of(folder: Path) -> Predictor:
    """Load the network of an MLflow model.

    Args:
        folder: The folder of the network in the model's folder of data. Its program is not loaded, because a file of
            torch.export may execute code that was pickled into it.

    Raises:
        CheckpointError: It is not a model that this program has logged, or files are missing or broken.
    """
    try:
        return open_predictor(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"is not a model with its preprocessing ({error.problem})",
            field=str(folder),
            remedy="log the model again with istanas sync RUN",
        ) from None


def _load_pyfunc(path: str) -> PictureModel:
    """Load the model for MLflow, with MLflow's own loader of the program.

    Args:
        path: The folder of the network in the model's folder of data.
    """
    import mlflow.pytorch

    card = read_card(path)
    network = mlflow.pytorch.load_model(str(Path(path).parents[1]))
    return PictureModel(Predictor(network, card.preprocessing, card.class_names))


def registered_predictor(reference: str, tracking_uri: str | None) -> Predictor:
    """Load the network of a version of a registered model.

    Args:
        reference: models:/NAME@ALIAS or models:/NAME/VERSION.
        tracking_uri: The MLflow store, see `pipeline.tracking.store.store_uri`.

    Raises:
        ConfigError: The reference is invalid, or the store has no such version.
        CheckpointError: See `predictor_of`.
    """
    field = f"model {reference!r:.100}"
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise ConfigError(
            "not a registered model", field=field, remedy="write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    uri = store_uri(tracking_uri)
    if not store_exists(uri):
        raise ConfigError(
            f"the MLflow store {public_uri(uri)} does not exist",
            field=field,
            remedy="set tracking.uri or MLFLOW_TRACKING_URI",
        )
    with tempfile.TemporaryDirectory() as scratch:
        return predictor_of(_download(parts, field, uri, scratch) / "data" / NETWORK_FOLDER)


def _download(parts: re.Match[str], field: str, uri: str, scratch: str) -> Path:
    """Download the files of a version into a folder, and return the folder of the model."""
    with readable(uri):
        client = open_client(uri)
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            name, number = parts["name"], parts["version"]
            if number is None:
                number = str(client.get_model_version_by_alias(name, parts["alias"]).version)
            source = client.get_model_version_download_uri(name, number)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ConfigError(
                f"not in the MLflow store {public_uri(uri)} ({one_line(error)})",
                field=field,
                remedy="see the registered models with istanas ui",
            ) from None
        return Path(download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=uri))
