"""The quantisation of an exported network to 8-bit integers, with its size, latency and accuracy before and after."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from istanas.data import ImageDataset, Pictures, Preprocessing, stratified_subset
from istanas.errors import IstanasError
from istanas.limits import RECORD_BYTES, read_at_most
from istanas.seeds import derive_seed
from pipeline.base.files import atomic_write
from pipeline.config.schema import Config
from pipeline.jobs.evaluation import pictures_at
from pipeline.runs.layout import INT8_FILE, INT8_REPORT, ONNX_FILE
from pipeline.runs.predictor import BATCH, CPU, ONNX_INPUT, Model, load_onnx
from pipeline.training.profiling import interleaved_seconds
from pipeline.training.splits import splits_of

CALIBRATION_PICTURES = 256
"""Most training pictures whose activations determine the ranges of the 8-bit numbers."""

EXPORT_METRICS = "export/"
"""Prefix of the metrics of an export."""

_CALIBRATION_BATCH = 32
_RUNS, _WARM_UP = 30, 3


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures on which a quantised network is calibrated or measured.

    Args:
        name: What they are, for people.
        pictures: The split of the data set that contains them.
        indices: (N,) int64 indices into it.
    """

    name: str
    pictures: Pictures
    indices: Tensor

    def batches(self, steps: Preprocessing, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield labels (B,) and network inputs (B, C, H, W) float32."""
        for part in self.indices.split(size):
            yield self.pictures.labels[part], steps.normalized(pictures_at(self.pictures, part, steps))


@dataclass(frozen=True)
class Int8Plan:
    """What a quantisation needs beside the network.

    Args:
        steps: The preprocessing of the network.
        calibration: Training pictures.
        measured: The pictures that measure the accuracy.
        tolerance: Largest accepted loss of top-1 accuracy in percentage points.
    """

    steps: Preprocessing
    calibration: LabelledPictures
    measured: LabelledPictures
    tolerance: float


class OnnxFigures(TypedDict):
    """Size of an ONNX file, milliseconds for one picture on one CPU thread (median), and its top-1 accuracy."""

    bytes: int
    latency_ms: float
    top1: float


class Int8Report(TypedDict):
    """The figures of a network before (fp32) and after (int8) its quantisation; `tolerance` is in percentage points."""

    measured: str
    pictures: int
    calibration_pictures: int
    tolerance: float
    difference: float
    fp32: OnnxFigures
    int8: OnnxFigures


def plan_int8(
    config: Config, dataset: ImageDataset, job: str, steps: Preprocessing, label: str, tolerance: float
) -> Int8Plan:
    """Choose the pictures of a quantisation.

    Calibration pictures are a stratified part of those that trained the network. The accuracy is measured on the
    hold-out if there is one, because the test split should not decide anything, and otherwise on the test split.

    Args:
        config: The configuration of the run.
        dataset: Its data set.
        job: The kind of the run, "retrain" or "search".
        steps: The preprocessing of the network.
        label: The name of the data set for people.
        tolerance: See `Int8Plan`.
    """
    splits = splits_of(config, dataset, job)
    labels = dataset.train.labels[splits.training]
    chosen = stratified_subset(labels, CALIBRATION_PICTURES, derive_seed(config.seed, "calibration"))
    calibration = LabelledPictures("training pictures", dataset.train, splits.training[chosen])
    if splits.holdout is not None:
        measured = LabelledPictures(f"the hold-out of {label}", dataset.train, splits.holdout)
    else:
        measured = LabelledPictures(
            f"the test split of {label}", dataset.test, torch.arange(len(dataset.test))
        )
    return Int8Plan(steps, calibration, measured, tolerance)


def quantize_export(folder: Path, plan: Int8Plan) -> Int8Report:
    """Quantise the ONNX file of an export, and write the result and its figures beside it.

    Args:
        folder: The folder with the ONNX file in float32.
        plan: The pictures, and the largest accepted loss of accuracy.

    Raises:
        IstanasError: The top-1 accuracy falls by more than `plan.tolerance` points. The files are written nevertheless,
            because the caller drops the folder.
    """
    source, target = folder / ONNX_FILE, folder / INT8_FILE
    _quantize(source, target, plan)
    models = [load_onnx(file)[0] for file in (source, target)]
    accuracies, difference = _accuracies(models, plan)
    latencies = _latencies(models, torch.zeros(1, *plan.steps.shape))
    before, after = (
        OnnxFigures(bytes=file.stat().st_size, latency_ms=latency, top1=accuracy)
        for file, latency, accuracy in zip((source, target), latencies, accuracies, strict=True)
    )
    report = Int8Report(
        measured=plan.measured.name,
        pictures=len(plan.measured.indices),
        calibration_pictures=len(plan.calibration.indices),
        tolerance=plan.tolerance,
        difference=difference,
        fp32=before,
        int8=after,
    )
    check_loss(report, plan.tolerance)
    atomic_write(folder / INT8_REPORT, json.dumps(report, indent=1) + "\n")
    return report


def is_accurate(report: Int8Report, tolerance: float) -> bool:
    """Return whether the top-1 accuracy has fallen by at most the tolerance, in percentage points.

    Example:
        >>> figures = [OnnxFigures(bytes=1, latency_ms=1.0, top1=top1) for top1 in (0.58, 0.57)]
        >>> report = Int8Report(measured="", pictures=100, calibration_pictures=1, tolerance=1.0, difference=0.0,
        ...                     fp32=figures[0], int8=figures[1])
        >>> is_accurate(report, 1.0), is_accurate(report, 0.5)
        (True, False)
    """
    lost = 100 * (report["fp32"]["top1"] - report["int8"]["top1"])
    return lost <= tolerance + 1e-9  # a share of n pictures is not exact in binary


def check_loss(report: Int8Report, tolerance: float) -> None:
    """Check that a quantised network is accurate enough.

    Raises:
        IstanasError: Its top-1 accuracy has fallen by more than the tolerance, in percentage points.
    """
    if not is_accurate(report, tolerance):
        raise IstanasError(
            f"top-1 accuracy on {report['measured']} falls from {100 * report['fp32']['top1']:.2f} to "
            f"{100 * report['int8']['top1']:.2f} %, by more than the tolerance of {tolerance:g} points",
            field="--precision int8",
            remedy="accept it with a larger --tolerance, or export without --precision int8",
        )


def read_report(folder: Path) -> Int8Report | None:
    """Return the figures in an export folder; None if it has no complete quantised network."""
    file = folder / INT8_REPORT
    if not file.is_file() or not (folder / INT8_FILE).is_file():
        return None
    try:
        report: Int8Report = json.loads(read_at_most(file, RECORD_BYTES))
        describe_int8(report)  # uses its values
    except (ValueError, TypeError, KeyError):  # changed by somebody: the export is repeated
        return None
    return report


def describe_int8(report: Int8Report) -> list[str]:
    """Return lines for the user: the figures before and after, on which pictures they were measured, and a larger file.

    Example:
        >>> figures = [OnnxFigures(bytes=size, latency_ms=1.0, top1=0.5) for size in (150_000, 160_000)]
        >>> report = Int8Report(measured="the test split", pictures=100, calibration_pictures=10, tolerance=1.0,
        ...                     difference=0.0, fp32=figures[0], int8=figures[1])
        >>> describe_int8(report)[-1]
        'int8: the file is larger than in float32, 160,000 instead of 150,000 bytes'
    """
    before, after = report["fp32"], report["int8"]
    larger = (
        f"int8: the file is larger than in float32, {after['bytes']:,} instead of {before['bytes']:,} bytes"
    )
    return [
        f"int8: {before['bytes'] / 1e6:.2f} -> {after['bytes'] / 1e6:.2f} MB, "
        f"{before['latency_ms']:.3g} -> {after['latency_ms']:.3g} ms for one picture on one CPU thread, "
        f"top-1 {100 * before['top1']:.2f} -> {100 * after['top1']:.2f} %",
        f"int8: top-1 on {report['pictures']:,} pictures, {report['measured']}; calibrated with "
        f"{report['calibration_pictures']:,} training pictures",
        *([larger] if after["bytes"] > before["bytes"] else []),
    ]


def int8_metrics(report: Int8Report) -> dict[str, float]:
    """Return the figures as metrics of a run: `export/fp32_top1`, `export/int8_top1` and so on."""
    return {
        f"{EXPORT_METRICS}{name}_{key}": value
        for name, figures in (("fp32", report["fp32"]), ("int8", report["int8"]))
        for key, value in (
            ("bytes", figures["bytes"]),
            ("latency_ms", figures["latency_ms"]),
            ("top1", figures["top1"]),
        )
    }


def _quantize(source: Path, target: Path, plan: Int8Plan) -> None:
    """Write the network with 8-bit weights, quantised per channel, and 8-bit activations."""
    import onnx  # imported here, because only this job needs it
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = plan.calibration.batches(plan.steps, _CALIBRATION_BATCH)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self._batches, None)
            return None if found is None else {ONNX_INPUT: found[1].contiguous().numpy()}

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / ONNX_FILE
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        norms = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "BatchNormalization"]
        quantize_static(
            prepared,
            target,
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7 bits for weights: without VNNI instructions, sums of products with 8-bit weights can overflow.
            reduce_range=True,
            nodes_to_exclude=norms,  # those that could not be folded into a convolution
            # Logits of 8 bits would often be equal.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )


@torch.no_grad()
def _accuracies(models: list[Model], plan: Int8Plan) -> tuple[list[float], float]:
    """Return the top-1 accuracy of both models, and the largest absolute difference of their logits."""
    correct, difference = [0, 0], 0.0
    for labels, inputs in plan.measured.batches(plan.steps, BATCH):
        logits = [model(inputs) for model in models]
        correct = [c + int((each.argmax(1) == labels).sum()) for c, each in zip(correct, logits, strict=True)]
        difference = max(difference, (logits[0] - logits[1]).abs().max().item())
    return [c / len(plan.measured.indices) for c in correct], difference


def _latencies(models: list[Model], picture: Tensor) -> list[float]:
    """Return the median milliseconds of each model for one picture, measured in turns."""
    calls = [lambda model=model: model(picture) for model in models]
    interleaved_seconds(calls, _WARM_UP, CPU)
    return [1000 * statistics.median(each) for each in interleaved_seconds(calls, _RUNS, CPU)]
