"""A trained network on disk: weights as safetensors, and a JSON file that describes the network and its input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter

from istanas.data import ImageDataset, Preprocessing
from istanas.errors import CheckpointError, IstanasError
from istanas.limits import (
    MAX_SIDE,
    NETWORK_LAYERS,
    RECORD_BYTES,
    SMALL_SIDE,
    WEIGHTS_HEADER_BYTES,
    read_at_most,
)
from istanas.nets import TargetNetwork
from istanas.space import SPACES, Genotype, NetworkSize, SearchSpace
from pipeline.base.files import atomic_write
from pipeline.config.schema import RetrainSettings, SearchSection
from pipeline.runs.layout import NETWORK_FILE, WEIGHTS_FILE

BATCH_AXIS = "batch"  # name of the first axis of a traced network, which is dynamic
_FLAT = ("shape", "mean", "std", "background", "bits")  # the preprocessing in the files of version 0.1


@dataclass(frozen=True)
class NetworkCard:
    """How to build a trained network and what input it takes.

    Args:
        genotype: The genotype as JSON, which names its search space.
        init_channels, layers, num_classes, stem, op_batchnorm: See `NetworkSize`.
        preprocessing: How a picture becomes the input of the network.
        class_names: Names of the classes, in the order of the logits.
        space: The settings of the search space.
    """

    genotype: str
    init_channels: int
    layers: int
    num_classes: int
    stem: str
    op_batchnorm: bool
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    space: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the content of network.json, from which `parse_card` returns the card."""
        return json.dumps({**asdict(self), "preprocessing": self.preprocessing.to_dict()}, indent=1)


def save_network(
    folder: Path,
    net: TargetNetwork,
    genotype: Genotype,
    sizes: SearchSection | RetrainSettings,
    dataset: ImageDataset,
    space: SearchSpace,
) -> None:
    """Write a trained network without its auxiliary head, and its card; `sizes` are the settings that built it."""
    card = NetworkCard(
        genotype=genotype.to_json(),
        init_channels=sizes.init_channels,
        layers=sizes.layers,
        num_classes=dataset.num_classes,
        stem=sizes.stem,
        op_batchnorm=sizes.op_batchnorm,
        preprocessing=dataset.preprocessing,
        class_names=tuple(dataset.class_names),
        space=asdict(space),  # type: ignore[call-overload]
    )
    write_network(folder, net, card)


def write_network(folder: Path, net: torch.nn.Module, card: NetworkCard) -> None:
    """Write a network without its auxiliary head, and its card."""
    weights = {
        k: v.cpu().contiguous() for k, v in net.state_dict().items() if not k.startswith("auxiliary_head")
    }
    atomic_write(folder / WEIGHTS_FILE, safetensors.torch.save(weights))
    atomic_write(folder / NETWORK_FILE, card.to_json())


def read_card(folder: str | Path) -> NetworkCard:
    """Read the card of a network.

    Raises:
        CheckpointError: network.json is missing, or is not a card.
    """
    folder = Path(folder)
    try:
        return parse_card(read_at_most(folder / NETWORK_FILE, RECORD_BYTES))
    except (OSError, ValueError, TypeError) as error:
        raise _incomplete(folder, error) from None


def parse_card(text: str | bytes) -> NetworkCard:
    """Return the card in the content of network.json; files of version 0.1 have no section `preprocessing`.

    Raises:
        ValueError: The content is not a card.
    """
    content = json.loads(text)
    if (
        isinstance(content, dict)
        and "preprocessing" not in content
        and isinstance(content.get("shape"), list)
    ):
        # Version 0.1 did not record how pictures were scaled, which is known only for large ones.
        is_large = max(content["shape"][1:], default=0) > SMALL_SIDE
        flat = {key: content[key] for key in _FLAT if key in content}
        content["preprocessing"] = {**flat, "resize": "resize_and_crop" if is_large else "none"}
    card = TypeAdapter(NetworkCard).validate_python(content)
    check_input(card.preprocessing, card.class_names, card.num_classes)
    return card


def check_input(steps: Preprocessing, class_names: Sequence[str], num_classes: int) -> None:
    """Check that a preprocessing can be executed, and that each output of a network has a class.

    Raises:
        ValueError: They contradict themselves.
    """
    if min(steps.shape) < 1:
        raise ValueError(f"shape {steps.shape}")
    if not 8 <= steps.bits <= 16 or not all(0 <= value <= 255 for value in steps.background):
        raise ValueError(f"bits {steps.bits} and background {steps.background}")
    if not len(steps.mean) == len(steps.std) == steps.shape[0]:
        raise ValueError(f"{len(steps.mean)} means for {steps.shape[0]} channels")
    if not all(math.isfinite(value) for value in (*steps.mean, *steps.std)) or min(steps.std) <= 0:
        raise ValueError(f"means {steps.mean} and standard deviations {steps.std}")
    if len(set(class_names)) != num_classes or len(class_names) != num_classes:
        raise ValueError(f"{len(set(class_names))} different names of {num_classes} classes")


def load_network(folder: str | Path) -> tuple[TargetNetwork, torch.Tensor]:
    """Load the trained network of a run directory in eval mode, and two blank pictures of its input shape.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = Path(folder)
    try:
        card = read_card(folder)
        # The meta device allocates no memory, because a malicious card may describe a huge network.
        with torch.device("meta"):
            promised = _build(card).state_dict()
        size = sum(value.nbytes for value in promised.values())
        weights = safetensors.torch.load(read_at_most(folder / WEIGHTS_FILE, size + WEIGHTS_HEADER_BYTES))
        if {k: v.shape for k, v in promised.items()} != {k: v.shape for k, v in weights.items()}:
            raise ValueError(f"{WEIGHTS_FILE} does not fit {NETWORK_FILE}")
        net = _build(card)
        net.load_state_dict(weights)
    except (OSError, ValueError, TypeError, RuntimeError, IstanasError, safetensors.SafetensorError) as error:
        raise _incomplete(folder, error) from None
    return net.eval(), torch.zeros(2, *card.preprocessing.shape)


def trace_program(net: torch.nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Trace a network for pictures of one size and batches of any size.

    Args:
        net: The network, in eval mode.
        shape: (C, H, W).

    Example:
        >>> from istanas.nets import TargetNet
        >>> from istanas.space import PUBLISHED
        >>> net = TargetNet(PUBLISHED["ISTA_twostage"], 2, 1, 10).eval()
        >>> trace_program(net, (3, 8, 8)).module()(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 10])
    """
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    # Two pictures, because the tracer would treat a batch size of 1 as a constant.
    program = torch.export.export(net, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def _incomplete(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())  # torch's errors have many lines
    return CheckpointError(
        f"does not contain a complete trained network ({reason:.200})",
        field=str(folder),
        remedy="train it again, or copy the run again",
    )


def _build(card: NetworkCard) -> TargetNetwork:
    shape = card.preprocessing.shape
    if card.layers > NETWORK_LAYERS or max(shape[1:]) > MAX_SIDE:
        raise ValueError(f"{NETWORK_FILE} has {card.layers} layers for pictures of {shape}")
    genotype = Genotype.from_json(card.genotype)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in card.space.items()}
    size = NetworkSize(
        card.init_channels,
        card.layers,
        card.num_classes,
        stem=card.stem,
        in_channels=shape[0],
        op_batchnorm=card.op_batchnorm,
    )
    return SPACES.find(genotype.space)(**settings).target(genotype, size)
