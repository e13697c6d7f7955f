"""The export of a trained network to formats that other programs load, with a check of each file.

| format | file | load it with |
|---|---|---|
| safetensors | model.safetensors, network.json, genotype.json | `pipeline.runs.network_files.load_network(FOLDER)` |
| program | model.pt2 | `torch.export.load(FILE).module()`, torch alone |
| onnx | model.onnx | any ONNX runtime: input "pictures", output "logits", both with a dynamic first axis "batch" |

The input is normalised float32 pictures (B, C, H, W). How a picture becomes such an input, and the class names, are in
network.json, in the metadata of the ONNX file and in the extra file network.json of model.pt2.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from istanas.errors import IstanasError
from istanas.nets import TargetNetwork
from istanas.space import Genotype
from pipeline.base.extras import check_extra
from pipeline.base.files import atomic_write
from pipeline.runs.layout import GENOTYPE_FILE, NETWORK_FILE, ONNX_FILE, PROGRAM_FILE, WEIGHTS_FILE
from pipeline.runs.network_files import (
    BATCH_AXIS,
    NetworkCard,
    load_network,
    trace_program,
    write_network,
)
from pipeline.runs.predictor import ONNX_INPUT, ONNX_OUTPUT, Model, load_onnx

FORMAT_FILES = {"safetensors": WEIGHTS_FILE, "program": PROGRAM_FILE, "onnx": ONNX_FILE}
EXPORTED_FILES = (WEIGHTS_FILE, NETWORK_FILE, GENOTYPE_FILE, PROGRAM_FILE, ONNX_FILE)
BATCH_SIZES = (1, 2, 7, 32)
# Relative to the largest logit. The formats sum in another order (batch norms are folded into convolutions), which
# changes float32 logits by about 1e-6; a wrong padding or a missing operation changes them by 1e-2 or more.
TOLERANCE = 1e-4


class ExportedFormat(TypedDict):
    """One format: its file, its size, and the largest absolute difference of its logits from the network's."""

    file: str
    bytes: int
    difference: float


def export_formats(net: TargetNetwork, card: NetworkCard, folder: Path) -> dict[str, ExportedFormat]:
    """Write a network in every format, load each again from the disk, and compare it with the network.

    Args:
        net: The network, in eval mode, on the CPU, as `pipeline.runs.network_files.load_network` returns it.
        card: How it was built, as `pipeline.runs.network_files.read_card` returns it.
        folder: Where the files are written; created if it does not exist.

    Returns:
        For each format ("safetensors", "program", "onnx") its file, size and difference.

    Raises:
        IstanasError: A package is missing, the network's logits are not finite, or a format differs by more than
            `TOLERANCE` times the largest logit.

    Example:
        >>> from pipeline.runs.network_files import read_card
        >>> net, _ = load_network("runs/digits-retrain-0123abcd")  # doctest: +SKIP
        >>> card = read_card("runs/digits-retrain-0123abcd")  # doctest: +SKIP
        >>> export_formats(net, card, Path("formats"))["onnx"]  # doctest: +SKIP
        {'file': 'model.onnx', 'bytes': 61105, 'difference': 1.9073486328125e-06}
    """
    check_extra("export", "export")
    batches = random_batches(card.preprocessing.shape)
    expected = run_model(net, batches)
    largest = expected.abs().max().item()
    if not largest < float("inf"):
        raise IstanasError(
            "the network's logits on random pictures are not finite", field="export", remedy="retrain it"
        )
    write_network(folder, net, card)
    atomic_write(folder / GENOTYPE_FILE, Genotype.from_json(card.genotype).to_json() + "\n")
    program = trace_program(net, card.preprocessing.shape)
    torch.export.save(program, folder / PROGRAM_FILE, extra_files={NETWORK_FILE: card.to_json()})
    save_onnx(program, card, folder / ONNX_FILE)
    loaders: dict[str, Callable[[], Model]] = {
        "safetensors": lambda: load_network(folder)[0],
        "program": lambda: load_program(folder / PROGRAM_FILE),
        "onnx": lambda: load_onnx(folder / ONNX_FILE)[0],
    }
    report: dict[str, ExportedFormat] = {}
    for name, file in FORMAT_FILES.items():
        difference = (run_model(loaders[name](), batches) - expected).abs().max().item()
        check_difference(name, difference, largest)
        report[name] = {"file": file, "bytes": (folder / file).stat().st_size, "difference": difference}
    return report


def check_difference(name: str, difference: float, largest: float) -> None:
    """Check that the logits of a format equal the network's.

    Args:
        name: Name of the format.
        difference: Largest absolute difference of the logits, >= 0 or NaN.
        largest: Largest absolute logit of the network, > 0.

    Raises:
        IstanasError: The difference is above `TOLERANCE` times the largest logit, or NaN.

    Example:
        >>> check_difference("onnx", difference=1e-5, largest=2.0)
    """
    if not difference <= TOLERANCE * largest:  # also true for NaN
        raise IstanasError(
            f"{name} differs from the network by {difference:.2g} in logits of up to {largest:.2g}, more than "
            f"{TOLERANCE:g} of the largest",
            field="export",
            remedy="report it, with the versions of torch and onnxruntime",
        )


def random_batches(shape: tuple[int, int, int], sizes: Sequence[int] = BATCH_SIZES) -> list[Tensor]:
    """Return batches of random pictures, the same ones in every call.

    Args:
        shape: (C, H, W).
        sizes: Batch sizes, >= 1.

    Returns:
        One tensor (B, C, H, W) for each size, standard normal like normalised pictures.

    Example:
        >>> [tuple(batch.shape) for batch in random_batches((3, 8, 8), (1, 7))]
        [(1, 3, 8, 8), (7, 3, 8, 8)]
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *shape, generator=generator) for size in sizes]


@torch.no_grad()
def run_model(model: Model, batches: Sequence[Tensor]) -> Tensor:
    """Return the logits (sum of B, classes) of all pictures of all batches."""
    return torch.cat([model(batch) for batch in batches])


def save_onnx(program: torch.export.ExportedProgram, card: NetworkCard, file: Path) -> None:
    """Write a traced network as one ONNX file that contains its weights.

    The metadata, each value in JSON, are the section `preprocessing` of network.json, `class_names` and `genotype`.

    Args:
        program: The traced network, as `trace_program` returns it.
        card: The card of the network.
        file: The file to write.
    """
    with _without_warnings_of_schemas():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[ONNX_INPUT],
            output_names=[ONNX_OUTPUT],
            dynamic_shapes={"x": {0: torch.export.Dim(BATCH_AXIS, min=1)}},  # of `TargetNetwork.forward`
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    # The history of each operation is several times as large as a small network's weights.
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.update(
        preprocessing=json.dumps(card.preprocessing.to_dict()),
        class_names=json.dumps(card.class_names),
        genotype=card.genotype,
    )
    exported.save(file, external_data=False)


@contextmanager
def _without_warnings_of_schemas() -> Iterator[None]:
    """Suppress warnings of torch 2.9 about torchvision's operations, which the network does not use."""
    logger = logging.getLogger("torch.onnx._internal.exporter._schemas")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_program(file: Path) -> Model:
    """Load a network that `torch.export.save` wrote: (B, C, H, W) -> logits (B, classes)."""
    with warnings.catch_warnings():
        # Some releases of torch warn of a buffer of their own.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(file).module()
