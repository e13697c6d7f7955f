"""A trained network in the formats that other programs load, each read back from the disk and compared.

| format | file | load it with |
|---|---|---|
| safetensors | model.safetensors, network.json, genotype.json | `pipeline.runs.network_files.load_network(FOLDER)` |
| program | model.pt2 | `torch.export.load(FILE).module()`, torch alone |
| onnx | model.onnx | any ONNX runtime: input "pictures", output "logits", both with a free first axis "batch" |

All take normalised float32 pictures (B, C, H, W); mean and std are in network.json and in the ONNX metadata.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from istanas.errors import IstanasError
from istanas.nets import TargetNet
from istanas.space import Genotype
from pipeline.base.files import atomic_write
from pipeline.runs.layout import GENOTYPE_FILE, NETWORK_FILE, ONNX_FILE, PROGRAM_FILE, WEIGHTS_FILE
from pipeline.runs.network_files import NetworkCard, load_network, write_network

FORMAT_FILES = {"safetensors": WEIGHTS_FILE, "program": PROGRAM_FILE, "onnx": ONNX_FILE}
EXPORTED_FILES = (WEIGHTS_FILE, NETWORK_FILE, GENOTYPE_FILE, PROGRAM_FILE, ONNX_FILE)
ONNX_INPUT, ONNX_OUTPUT, BATCH_AXIS = "pictures", "logits", "batch"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (1, 2, 7, 32)
# Of the largest logit. The formats round the same float32 sums in another order (batch norms are folded into
# convolutions), which costs some 1e-6; a wrong padding or a lost operation changes logits by 1e-2 and more.
TOLERANCE = 1e-4

Model = Callable[[Tensor], Tensor]


class ExportedFormat(TypedDict):
    """One format: its file, and its largest absolute difference from the network, in logits."""

    file: str
    bytes: int
    difference: float


def export_formats(net: TargetNet, card: NetworkCard, folder: Path) -> dict[str, ExportedFormat]:
    """Write a network in every format, load each again from the disk, and compare it with the network.

    Args:
        net: in eval mode, on the CPU, as `pipeline.runs.network_files.load_network` gives it.
        card: how it was built, as `pipeline.runs.network_files.read_card` gives it.
        folder: created if need be.

    Returns:
        Format ("safetensors", "program", "onnx") -> file, size and difference.

    Raises:
        IstanasError: if a package is missing, the network's logits are not finite, or a format differs by more
            than `TOLERANCE` of the largest logit.

    Example:
        >>> from pipeline.runs.network_files import read_card
        >>> net, _ = load_network("runs/digits-retrain-0123abcd")  # doctest: +SKIP
        >>> card = read_card("runs/digits-retrain-0123abcd")  # doctest: +SKIP
        >>> export_formats(net, card, Path("formats"))["onnx"]  # doctest: +SKIP
        {'file': 'model.onnx', 'bytes': 61105, 'difference': 1.9073486328125e-06}
    """
    check_packages()
    batches = random_batches(card.shape)
    expected = run_model(net, batches)
    largest = expected.abs().max().item()
    if not largest < float("inf"):
        raise IstanasError("export: the network's logits on random pictures are not finite, retrain it")
    write_network(folder, net, card)
    atomic_write(folder / GENOTYPE_FILE, Genotype.from_json(card.genotype).to_json() + "\n")
    program = trace_program(net, card.shape)
    torch.export.save(program, folder / PROGRAM_FILE)
    save_onnx(program, card, folder / ONNX_FILE)
    loaders: dict[str, Callable[[], Model]] = {
        "safetensors": lambda: load_network(folder)[0],
        "program": lambda: load_program(folder / PROGRAM_FILE),
        "onnx": lambda: load_onnx(folder / ONNX_FILE),
    }
    report: dict[str, ExportedFormat] = {}
    for name, file in FORMAT_FILES.items():
        difference = (run_model(loaders[name](), batches) - expected).abs().max().item()
        check_difference(name, difference, largest)
        report[name] = {"file": file, "bytes": (folder / file).stat().st_size, "difference": difference}
    return report


def check_packages() -> None:
    """Refuse before any work if what writes and runs ONNX is not installed.

    Raises:
        IstanasError: naming the package and how to get it.
    """
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise IstanasError(
                f"export: package {name} can't be used ({reason}), run: pip install {' '.join(ONNX_PACKAGES)}"
            ) from None


def check_difference(name: str, difference: float, largest: float) -> None:
    """Refuse a format whose logits are not the network's.

    Args:
        name: of the format.
        difference: the largest absolute difference of logits.
        largest: the largest absolute logit of the network.

    Raises:
        IstanasError: if the difference is above `TOLERANCE` times the largest logit, or is not a number.

    Example:
        >>> check_difference("onnx", difference=1e-5, largest=2.0)
    """
    if not difference <= TOLERANCE * largest:  # so written, it refuses what is not a number
        raise IstanasError(
            f"export: {name} differs from the network by {difference:.2g} in logits of up to {largest:.2g}, "
            f"more than {TOLERANCE:g} of them; report it, with the versions of torch and onnxruntime"
        )


def random_batches(shape: tuple[int, int, int], sizes: Sequence[int] = BATCH_SIZES) -> list[Tensor]:
    """Batches of random pictures, always the same ones.

    Args:
        shape: (C, H, W).
        sizes: of the batches, >= 1.

    Returns:
        One (B, C, H, W) a size, standard normal as normalised pictures are.

    Example:
        >>> [tuple(batch.shape) for batch in random_batches((3, 8, 8), (1, 7))]
        [(1, 3, 8, 8), (7, 3, 8, 8)]
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *shape, generator=generator) for size in sizes]


@torch.no_grad()
def run_model(model: Model, batches: Sequence[Tensor]) -> Tensor:
    """The logits (sum of B, classes) of all pictures of all batches."""
    return torch.cat([model(batch) for batch in batches])


def trace_program(net: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The operations that a network runs on pictures of a size, for any number of them.

    Args:
        net: in eval mode.
        shape: (C, H, W).

    Example:
        >>> from istanas.space import PUBLISHED
        >>> net = TargetNet(PUBLISHED["ISTA_twostage"], 2, 1, 10).eval()
        >>> trace_program(net, (3, 8, 8)).module()(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 10])
    """
    # Two pictures, because one would make the tracer take the batch for a constant.
    program = torch.export.export(net, (torch.zeros(2, *shape),), dynamic_shapes=_dynamic_shapes())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of this machine
    return program


def save_onnx(program: torch.export.ExportedProgram, card: NetworkCard, file: Path) -> None:
    """Write a traced network as one ONNX file that holds its weights.

    Metadata, each as JSON: `mean` and `std` per channel, `class_names`, `genotype`, and how picture files were read
    (`background`, `bits`), see `NetworkCard`.

    Args:
        program: as `trace_program` gives it.
        card: of the network.
        file: to write.
    """
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[ONNX_INPUT],
        output_names=[ONNX_OUTPUT],
        dynamic_shapes=_dynamic_shapes(),
        verbose=False,
    )
    assert exported is not None
    model = exported.model
    # How each operation came about: several times as long as a small network's weights.
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.update(
        mean=json.dumps(card.mean),
        std=json.dumps(card.std),
        class_names=json.dumps(card.class_names),
        genotype=card.genotype,
        background=json.dumps(card.background),
        bits=json.dumps(card.bits),
    )
    exported.save(file, external_data=False)


def load_program(file: Path) -> Model:
    """The network in a file that `torch.export.save` wrote: (B, C, H, W) -> logits (B, classes)."""
    return torch.export.load(file).module()


def load_onnx(file: Path) -> Model:
    """The network in an ONNX file, run by ONNX Runtime on one CPU thread: (B, C, H, W) -> logits (B, classes)."""
    onnxruntime = importlib.import_module("onnxruntime")  # has no types

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def model(pictures: Tensor) -> Tensor:
        (logits,) = session.run([ONNX_OUTPUT], {ONNX_INPUT: pictures.numpy()})
        return torch.from_numpy(logits)

    return model


def _dynamic_shapes() -> dict[str, dict[int, torch.export.Dim]]:
    """Of the argument of `TargetNet.forward`: any number of pictures of a fixed size."""
    return {"x": {0: torch.export.Dim(BATCH_AXIS, min=1)}}
