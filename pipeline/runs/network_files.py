"""A trained network on disk: weights as safetensors, and a JSON file that describes the network and its input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter

from istanas.data import ImageDataset
from istanas.data.reading import DEFAULT_DECODING
from istanas.errors import CheckpointError, IstanasError
from istanas.limits import MAX_SIDE, NETWORK_LAYERS, RECORD_BYTES, WEIGHTS_HEADER_BYTES, read_at_most
from istanas.nets import TargetNetwork
from istanas.space import SPACES, Genotype, NetworkSize, SearchSpace
from pipeline.base.files import atomic_write
from pipeline.config.schema import RetrainSettings, SearchSection
from pipeline.runs.layout import NETWORK_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class NetworkCard:
    """How to build a trained network and what input it takes.

    Args:
        genotype: The genotype as JSON, which names its search space.
        init_channels, layers, num_classes, stem, op_batchnorm: See `NetworkSize`.
        shape: Shape of a picture, (C, H, W).
        mean, std: Normalisation per channel, for pictures in [0, 1].
        class_names: Names of the classes, in the order of the logits.
        background: Colour (red, green, blue) over which transparent pictures were composited.
        bits: Number of bits that grey pictures of more than 8 bits use; the upper 8 are kept.
        space: The settings of the search space.
    """

    genotype: str
    init_channels: int
    layers: int
    num_classes: int
    stem: str
    op_batchnorm: bool
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    background: tuple[int, int, int] = DEFAULT_DECODING.background
    bits: int = DEFAULT_DECODING.bits
    space: dict[str, Any] = field(default_factory=dict)


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
        shape=(dataset.channels, dataset.height, dataset.width),
        mean=tuple(dataset.mean),
        std=tuple(dataset.std),
        class_names=tuple(dataset.class_names),
        background=dataset.decode_settings.background,
        bits=dataset.decode_settings.bits,
        space=asdict(space),  # type: ignore[call-overload]
    )
    write_network(folder, net, card)


def write_network(folder: Path, net: TargetNetwork, card: NetworkCard) -> None:
    """Write a network without its auxiliary head, and its card."""
    weights = {
        k: v.cpu().contiguous() for k, v in net.state_dict().items() if not k.startswith("auxiliary_head")
    }
    atomic_write(folder / WEIGHTS_FILE, safetensors.torch.save(weights))
    atomic_write(folder / NETWORK_FILE, json.dumps(asdict(card), indent=1))


def read_card(folder: str | Path) -> NetworkCard:
    """Read the card of a network that `load_network` accepts."""
    return TypeAdapter(NetworkCard).validate_json(read_at_most(Path(folder) / NETWORK_FILE, RECORD_BYTES))


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
        reason = " ".join(str(error).split())  # torch's errors have many lines
        raise CheckpointError(
            f"does not contain a complete trained network ({reason:.200})",
            field=str(folder),
            remedy="train it again, or copy the run again",
        ) from None
    return net.eval(), torch.zeros(2, *card.shape)


def _build(card: NetworkCard) -> TargetNetwork:
    if card.layers > NETWORK_LAYERS or max(card.shape[1:]) > MAX_SIDE:
        raise ValueError(f"{NETWORK_FILE} has {card.layers} layers for pictures of {card.shape}")
    if not 8 <= card.bits <= 16 or not all(0 <= value <= 255 for value in card.background):
        raise ValueError(f"{NETWORK_FILE} has bits {card.bits} and background {card.background}")
    genotype = Genotype.from_json(card.genotype)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in card.space.items()}
    size = NetworkSize(
        card.init_channels,
        card.layers,
        card.num_classes,
        stem=card.stem,
        in_channels=card.shape[0],
        op_batchnorm=card.op_batchnorm,
    )
    return SPACES.find(genotype.space)(**settings).target(genotype, size)
