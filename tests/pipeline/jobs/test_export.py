"""Every exported format, read from the disk, gives the network's logits; a run without a network is refused."""

import dataclasses
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from istanas.data import Preprocessing
from istanas.errors import CheckpointError, ConfigError, IstanasError
from istanas.nets import TargetNet
from istanas.space import PUBLISHED, Genotype
from pipeline.base.extras import EXTRAS
from pipeline.config.load import load
from pipeline.jobs.export import (
    EXPORT_ARTIFACTS,
    check_network,
    export_network,
    exported_before,
    replacing,
    run_export,
)
from pipeline.jobs.export_formats import (
    EXPORTED_FILES,
    TOLERANCE,
    ExportedFormat,
    check_difference,
    export_formats,
    random_batches,
    run_model,
)
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import NETWORK_FILE, ONNX_FILE, PROGRAM_FILE, WEIGHTS_FILE
from pipeline.runs.network_files import NetworkCard, load_network, write_network
from pipeline.runs.record import RunRecord
from tests.user_operations import USER_OPERATIONS, registered

# Node 1 and the last cell but one are dead, since their outputs are never read: only strided dilated convolutions, a
# strided identity and the blocks around them remain.
_DEAD = (
    (("dil_conv_3x3", 0), ("dil_conv_5x5", 0)),
    (("sep_conv_3x3", 1),),
    (("skip_connect", 0), ("skip_connect", 2)),
)
DEAD = Genotype(normal=_DEAD, reduce=_DEAD, normal_concat=(4,), reduce_concat=(4, 2))


class Case(NamedTuple):
    genotype: Genotype
    shape: tuple[int, int, int]
    channels: int
    layers: int
    stem: str = "cifar"
    op_batchnorm: bool = False


CASES = {
    "one-stage, grey, odd": Case(PUBLISHED["ISTA_onestage"], (1, 9, 11), 3, 3, op_batchnorm=True),
    "two-stage": Case(PUBLISHED["ISTA_twostage"], (3, 12, 12), 2, 2),
    "ImageNet, odd": Case(PUBLISHED["ISTA_ImageNet"], (3, 33, 35), 2, 3, stem="imagenet"),
    "dead parts": Case(DEAD, (2, 9, 9), 4, 3, op_batchnorm=True),
}
SMALL = Case(DEAD, (1, 8, 8), 2, 1)


def network(case: Case) -> tuple[TargetNet, NetworkCard]:
    """Return a network in which no batch norm is an identity, and its card."""
    channels = case.shape[0]
    card = NetworkCard(
        genotype=case.genotype.to_json(),
        init_channels=case.channels,
        layers=case.layers,
        num_classes=5,
        stem=case.stem,
        op_batchnorm=case.op_batchnorm,
        preprocessing=Preprocessing(
            case.shape, tuple(0.4 + 0.1 * c for c in range(channels)), (0.25,) * channels
        ),
        class_names=("air", "bird", "cat", "deer", "école"),
    )
    torch.manual_seed(1)
    net = TargetNet(
        case.genotype,
        case.channels,
        case.layers,
        card.num_classes,
        stem=case.stem,
        op_batchnorm=case.op_batchnorm,
        in_channels=channels,
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(5):
            net.train()(torch.randn(16, *case.shape))
    return net.eval(), card


@dataclasses.dataclass(frozen=True)
class Exported:
    case: Case
    net: TargetNet
    card: NetworkCard
    folder: Path
    report: dict[str, ExportedFormat]


SLOW = {"ImageNet, odd": [pytest.mark.slow]}


def test_operations_of_a_plugin_are_exported(tmp_path: Path) -> None:
    first, second, third = (operation.name for operation in USER_OPERATIONS)
    with registered(*USER_OPERATIONS):
        cell = (((first, 0), (second, 1)), ((third, 2), (first, 1)), ((second, 0), (third, 1)))
        case = Case(Genotype(normal=cell, reduce=cell), (1, 9, 11), 4, 2, op_batchnorm=True)
        net, card = network(case)
        assert set(export_formats(net, card, tmp_path)) == {"safetensors", "program", "onnx"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=name, marks=SLOW.get(name, [])) for name, case in CASES.items()],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net, card = network(request.param)
    folder = tmp_path_factory.mktemp("formats")
    return Exported(request.param, net, card, folder, export_formats(net, card, folder))


def test_every_format_gives_the_networks_logits(exported: Exported) -> None:
    """The files are read with each format's own loader, and the batches are not those of the export's own check."""
    session = onnxruntime.InferenceSession(exported.folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    models = {
        "safetensors": load_network(exported.folder)[0],
        "program": torch.export.load(exported.folder / PROGRAM_FILE).module(),
        "onnx": lambda x: torch.from_numpy(session.run(["logits"], {"pictures": x.numpy()})[0]),
    }
    assert exported.report.keys() == models.keys()
    generator = torch.Generator().manual_seed(9)
    for size in (1, 3, 50):
        pictures = 2 * torch.randn(size, *exported.case.shape, generator=generator)
        with torch.no_grad():
            expected = exported.net(pictures)
            assert expected.std() > 0.01  # equal logits would prove nothing
            for name, model in models.items():
                logits = model(pictures)
                assert logits.shape == (size, 5), name
                assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_the_report_is_what_was_measured(exported: Exported) -> None:
    assert exported.report["safetensors"]["difference"] == 0
    assert (
        0 < exported.report["onnx"]["difference"] < 1e-4
    )  # float32 sums in another order are never all equal
    assert {path.name for path in exported.folder.iterdir()} == set(EXPORTED_FILES)
    for format_ in exported.report.values():
        assert format_["bytes"] == (exported.folder / format_["file"]).stat().st_size


def test_the_onnx_file_says_how_to_feed_it(exported: Exported) -> None:
    model = onnx.load(exported.folder / ONNX_FILE, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)

    def signature(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
        dims = value.type.tensor_type.shape.dim
        return value.name, [d.dim_param or d.dim_value for d in dims]

    assert [signature(v) for v in model.graph.input] == [("pictures", ["batch", *exported.case.shape])]
    assert [signature(v) for v in model.graph.output] == [("logits", ["batch", 5])]
    metadata = {p.key: p.value for p in model.metadata_props}
    expected = json.loads(json.dumps(exported.card.preprocessing.to_dict()))
    assert expected["mean"] == list(exported.card.preprocessing.mean)
    assert json.loads(metadata["preprocessing"]) == expected
    extra = {NETWORK_FILE: ""}
    torch.export.load(exported.folder / PROGRAM_FILE, extra_files=extra)
    assert json.loads(extra[NETWORK_FILE])["preprocessing"] == expected
    assert json.loads(metadata["class_names"]) == list(exported.card.class_names)
    assert Genotype.from_json(metadata["genotype"]) == exported.case.genotype


def test_no_file_names_a_folder_of_this_machine(exported: Exported, repo_root: Path) -> None:
    for file in EXPORTED_FILES:
        content = (exported.folder / file).read_bytes()
        assert str(repo_root).encode() not in content, file
        assert torch.__path__[0].encode() not in content, file


# --- a run directory ---


def record(**changes: Any) -> RunRecord:
    values = {
        "name": "small",
        "kind": "retrain",
        "method": "two_stage",
        "dataset": "digits",
        "key": "k" * 32,
        "params": {},
        "tags": {},
        "description": "",
        "parent": None,
        "status": "FINISHED",
        "started_ms": 1,
        "ended_ms": 2,
        "artifacts": ("config.yaml", WEIGHTS_FILE),
        "result": {"test_top1": 0.5},
    }
    return RunRecord(**{**values, **changes})


def make_run(path: Path, **changes: Any) -> RunDir:
    run = RunDir(path)
    write_network(path, *network(SMALL))
    run.write(record(**changes))
    run.append_metrics(1, {"test/top1": 0.25}, timestamp_ms=1000)
    run.append_metrics(2, {"test/top1": 0.5}, timestamp_ms=2000)
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".run.lock"
    }


def test_a_run_is_exported_quietly_and_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", kind="search", method="one_stage")
    before = run.read()
    assert exported_before(run) is None
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        warnings.simplefilter("default")
        result = export_network(run, say=lines.append)
    assert [str(w.message) for w in warned] == []
    assert [r.getMessage() for r in caplog.records] == []
    assert capfd.readouterr() == ("", "")

    assert result["run_dir"] == str(run.path)
    assert result["digest"] == DEAD.digest()
    exports = result["exports"]
    assert json.loads(json.dumps(result)) == result
    assert len(lines) == 3
    for line, (name, e) in zip(lines, exports.items(), strict=True):
        size = f"{(run.path / e['file']).stat().st_size / 1e6:.2f} MB"
        assert line == f"{name}: {run.path / e['file']}, {size}, largest difference {e['difference']:.2g}"

    first, last = run.metrics()
    assert first == (1, 1000, {"test/top1": 0.25})
    assert last == (
        2,
        2000,
        {"test/top1": 0.5, **{f"export/{name}_difference": e["difference"] for name, e in exports.items()}},
    )
    after = run.read()
    assert after == dataclasses.replace(before, artifacts=(*before.artifacts, *EXPORT_ARTIFACTS))
    assert all((run.path / name).stat().st_size > 0 for name in EXPORT_ARTIFACTS)
    assert exported_before(run) == exports
    kept = files(run.path)

    # Export again, over the files of a killed export and of a user, and the figures of an export with 8-bit integers.
    run.replace_metrics([first, last._replace(metrics={"export/int8_top1": 0.5, **last.metrics})])
    (run.path / "export" / "stray.txt").write_text("from another day")
    (run.path / "export" / ONNX_FILE).write_text("broken")
    (run.path / ".export.new").mkdir()
    (run.path / ".export.new" / PROGRAM_FILE).write_text("half")
    assert export_network(run) == result
    again = files(run.path)
    assert again.keys() == kept.keys()
    # The archive of the program may differ in its bytes; all other files are equal.
    assert {k: v for k, v in again.items() if k != f"export/{PROGRAM_FILE}"} == {
        k: v for k, v in kept.items() if k != f"export/{PROGRAM_FILE}"
    }

    # The job does not repeat an export, unless the weights have changed.
    console = Console(file=io.StringIO(), width=500)
    config = load(None, ["tracking.enabled=false"])
    assert run_export(config, run.path, console=console)["exports"] == exports
    assert "already done" in console.file.getvalue()  # type: ignore[attr-defined]
    assert files(run.path) == again
    net, _ = load_network(run.path)
    with torch.no_grad():
        net.classifier.bias.add_(1)
    write_network(run.path, net, network(SMALL)[1])
    assert exported_before(run) is None


def test_weights_that_are_not_numbers_are_refused_and_the_old_export_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    net, card = network(SMALL)
    nn.init.constant_(net.classifier.bias, float("nan"))
    write_network(run.path, net, card)
    (run.path / "export").mkdir()
    (run.path / "export" / ONNX_FILE).write_text("of another day")
    before = files(run.path)
    with pytest.raises(IstanasError, match=r"^export: the network's logits .* not finite; retrain it$"):
        export_network(run)
    assert files(run.path) == before


@pytest.mark.parametrize(
    "before",
    [
        {"export/old": "old"},
        {"export/old": "old", ".export.new/half": "1"},
        {"export/old": "old", ".export.old/older": "2"},  # killed before it was deleted
        {".export.old/old": "old", ".export.new/whole": "3"},  # killed between the two renames
    ],
    ids=str,
)
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, before: dict[str, str]) -> None:
    folder = tmp_path / "export"
    for name, text in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def interrupted() -> None:
        with replacing(folder) as new:
            (new / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == {"export/old": b"old"}

    with replacing(folder) as new:
        (new / "new").write_text("new")
        assert (folder / "old").exists()
    assert files(tmp_path) == {"export/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with run.lock(), pytest.raises(ConfigError, match="in use by process"):
        export_network(run)
    assert not (run.path / "export").exists()


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_an_unfinished_run_has_nothing_to_export(tmp_path: Path, status: str) -> None:
    run = make_run(tmp_path / "run", status=status, kind="search", method="one_stage")
    with pytest.raises(
        ConfigError, match=rf"^run .*: is {status}, .*; wait until it has finished, or resume it .*$"
    ):
        export_network(run)
    assert not (run.path / "export").exists()


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED"])
def test_a_two_stage_search_has_no_network(tmp_path: Path, status: str) -> None:
    run = RunDir(tmp_path)
    run.write(record(status=status, kind="search"))
    with pytest.raises(ConfigError) as caught:
        export_network(run)
    assert str(caught.value).endswith(f"retrain it first: istanas retrain --genotype {tmp_path}")
    assert "\n" not in str(caught.value)
    check_network(run, record())  # its retraining, of the same method, is exportable


def test_a_missing_folder_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.json: missing"):
        export_network(RunDir(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", [NETWORK_FILE, WEIGHTS_FILE])
def test_a_broken_network_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run.path / name).write_bytes(b"{}")
    before = files(run.path)
    with pytest.raises(CheckpointError, match=r"^.*does not contain a complete trained network .*$"):
        export_network(run)
    assert files(run.path) == before


@pytest.mark.parametrize("name", EXTRAS["export"])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # the import system treats it as not installed
    run = make_run(tmp_path / "run")
    with pytest.raises(IstanasError, match=rf"^export: package {name} .* pip install 'istanas\[export\]'$"):
        export_network(run)
    assert not (run.path / "export").exists()


# --- the comparison ---


class Crooked(TargetNet):
    """A network whose traced form differs from the eager one."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.01 if torch.compiler.is_exporting() else logits


def test_a_format_that_differs_is_named_with_the_difference(tmp_path: Path) -> None:
    _, card = network(SMALL)
    net = Crooked(DEAD, 2, 1, 5, in_channels=1).eval()
    with pytest.raises(
        IstanasError, match=r"^export: program differs from the network by 0\.01 in logits .*$"
    ):
        export_formats(net, card, tmp_path)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_tolerance_is_relative_to_the_largest_logit(scale: float) -> None:
    check_difference("onnx", 0.9 * TOLERANCE * scale, scale)
    for difference in (1.1 * TOLERANCE * scale, float("nan"), float("inf")):
        with pytest.raises(IstanasError, match=r"^export: onnx differs"):
            check_difference("onnx", difference, scale)


def test_batches_are_random_but_always_the_same() -> None:
    first, second = random_batches((3, 8, 8)), random_batches((3, 8, 8))
    assert [batch.shape[0] for batch in first] == [1, 2, 7, 32]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    pictures = torch.cat(first)
    assert len(np.unique(pictures.numpy())) > 0.99 * pictures.numel()


def test_a_difference_in_one_picture_of_one_batch_counts() -> None:
    batches = random_batches((1, 8, 8))

    def model(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]

    def wrong(x: Tensor) -> Tensor:
        logits = model(x).clone()
        logits[6:7] += 3  # of a batch of 7 or more, the seventh picture
        return logits

    difference = (run_model(wrong, batches) - run_model(model, batches)).abs().amax(1)
    assert difference.nonzero().flatten().tolist() == [1 + 2 + 6, 1 + 2 + 7 + 6]
