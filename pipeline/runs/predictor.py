"""A trained network that takes pictures: loading it from any of its files, and classifying pictures with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from istanas.data import Preprocessing
from istanas.errors import CheckpointError, ConfigError
from istanas.nets import to_channels_last
from pipeline.base.extras import check_extra
from pipeline.base.onnx_sessions import onnx_session
from pipeline.base.text import one_line
from pipeline.runs.layout import NETWORK_FILE, ONNX_FILE, WEIGHTS_FILE
from pipeline.runs.network_files import check_input, load_network, read_card

Model = Callable[[Tensor], Tensor]
"""Maps normalised pictures (B, C, H, W) to logits (B, K)."""

BATCH = 256  # as in the evaluation of a training
TOP = 5
CPU = torch.device("cpu")
ONNX_INPUT, ONNX_OUTPUT = "pictures", "logits"


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Predictor:
    """A trained network with its preprocessing.

    Args:
        model: The network.
        preprocessing: How a picture becomes its input.
        class_names: Names of the K classes, in the order of the logits.
        device: The device of the network.
    """

    model: Model
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    device: torch.device = CPU

    @torch.no_grad()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """Return the probability of each class.

        Args:
            pictures: (N, C, H, W) uint8, as `Preprocessing.read` returns each.

        Returns:
            (N, K) float64; each row sums up to 1.

        Raises:
            CheckpointError: The network computes NaN or infinite values.
        """
        parts = (part.to(self.device) for part in pictures.split(BATCH))
        logits = torch.cat([self.model(self.preprocessing.normalized(part)) for part in parts]).double()
        if not logits.isfinite().all():
            raise CheckpointError(
                "the network computes NaN or infinite values", field="network", remedy="train it again"
            )
        return logits.softmax(1).cpu()

    def guesses(self, probabilities: Tensor, count: int = TOP) -> list[list[Guess]]:
        """Return the most probable classes of each picture, the most probable first.

        Args:
            probabilities: (N, K), as `probabilities` returns them.
            count: Number of classes, at most K of which are returned.
        """
        values, indices = probabilities.topk(min(count, len(self.class_names)), dim=1)
        return [
            [Guess(self.class_names[index], value) for value, index in zip(*row, strict=True)]
            for row in zip(values.tolist(), indices.tolist(), strict=True)
        ]


def is_network(path: Path) -> bool:
    """Return whether a path is a network file, or a folder with one that `open_predictor` can load.

    A file of weights must have its usual name, because network.json beside it belongs to that file. model.pt2 is not
    read, because loading a file of torch.export may execute code that was pickled into it.
    """
    if path.is_dir():
        return (path / NETWORK_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
    return (path.name == WEIGHTS_FILE or path.suffix == Path(ONNX_FILE).suffix) and path.is_file()


def open_predictor(path: Path, device: torch.device = CPU) -> Predictor:
    """Load a network from a file of an export, or from a folder with `model.safetensors` and `network.json`.

    Args:
        path: A run directory, an export folder, or one of the files model.safetensors and model.onnx.
        device: The device of the network; an ONNX file runs on the CPU.

    Raises:
        CheckpointError: A file is missing or broken, or has no preprocessing.
        IstanasError: It is an ONNX file, and ONNX Runtime is not installed.
    """
    if path.suffix == Path(ONNX_FILE).suffix:
        return _of_onnx(path)
    folder = path if path.is_dir() else path.parent
    net, _ = load_network(folder)
    card = read_card(folder)
    return Predictor(to_channels_last(net.to(device)), card.preprocessing, card.class_names, device)


def _of_onnx(file: Path) -> Predictor:
    check_extra("export", str(file), ["onnxruntime"])
    try:
        model, metadata = load_onnx(file)
        steps = TypeAdapter(Preprocessing).validate_json(metadata["preprocessing"])
        names = TypeAdapter(tuple[str, ...]).validate_json(metadata["class_names"])
        check_input(steps, names, int(model(torch.zeros(1, *steps.shape)).shape[1]))
    except (ImportError, MemoryError, ConfigError):
        raise  # the file is not the cause
    except KeyError as error:
        raise _unusable(file, f"no {error} in its metadata") from None
    except Exception as error:  # ONNX Runtime has error classes without a public base class
        raise _unusable(file, one_line(error)) from None
    return Predictor(model, steps, names)


def load_onnx(file: Path) -> tuple[Model, dict[str, str]]:
    """Load an ONNX file in ONNX Runtime, with one CPU thread.

    Returns:
        The model, and the metadata of the file.
    """
    session = onnx_session(file)

    def model(pictures: Tensor) -> Tensor:
        (logits,) = session.run([ONNX_OUTPUT], {ONNX_INPUT: pictures.contiguous().numpy()})
        return torch.from_numpy(logits)

    return model, session.get_modelmeta().custom_metadata_map


def _unusable(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"is not a network with its preprocessing ({reason})",
        field=str(file),
        remedy="export the run again with istanas export RUN",
    )
