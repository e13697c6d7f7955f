"""Measured tables of latencies: real measurements of a tiny space, the file, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from istanas.errors import ConfigError
from istanas.latency import LatencyTable, latency_predictor
from istanas.nets.operations import make_operation
from istanas.space import CellSpace, NetworkSize
from istanas.training import Compute
from pipeline.base.onnx_sessions import onnx_session
from pipeline.config.load import load
from pipeline.training.latency_measurement import call_of, measure_latencies, seconds_of_calls
from pipeline.training.latency_tables import read_table, table_warnings, write_table
from pipeline.training.profiling import interleaved_seconds

CPU = Compute(torch.device("cpu"))
SPACE, SIZE, SHAPE = (
    CellSpace(n_nodes=1, ops=("skip_connect", "sep_conv_5x5")),
    NetworkSize(4, 3, 10),
    (3, 16, 16),
)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    found = measure_latencies(SPACE, SIZE, SHAPE, CPU, runs=5)
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers have changed"
    return found


def test_a_measured_table_has_what_a_search_requires(table: LatencyTable) -> None:
    medians = {(each.operation, each.input): each.median_ms for each in table.candidates}
    assert medians["sep_conv_5x5", (4, 16, 16)] > medians["skip_connect", (4, 16, 16)] >= 0
    for each in (*table.candidates, *table.references, *table.checks):
        assert 0 <= each.lower_ms <= each.median_ms <= each.upper_ms
    assert table.fixed_ms >= 0
    assert (table.machine.threads, table.machine.dtype) == (torch.get_num_threads(), "float32")
    slow, fast = (((op, 0), (op, 1)) for op in ("sep_conv_5x5", "skip_connect"))
    predict = latency_predictor(table, SPACE, SIZE, SHAPE).predict
    genotypes = [SPACE.genotype({kind: [support] for kind in SPACE.kinds}) for support in ((1, 3), (0, 2))]
    assert [genotype.normal[0] for genotype in genotypes] == [slow, fast]
    assert predict(genotypes[0]) > predict(genotypes[1]) >= table.fixed_ms


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_events() -> None:
    if not torch.cuda.is_available():
        pytest.skip("GPU: no CUDA device; run this test where there is one")
    found = measure_latencies(SPACE, SIZE, SHAPE, Compute(torch.device("cuda"), torch.bfloat16), runs=5)
    assert (found.machine.device, found.machine.dtype) == ("cuda", "bfloat16")
    assert found.machine.device_name == torch.cuda.get_device_name()
    assert min(each.median_ms for each in found.references) > 0


def test_calls_take_turns_and_follow_an_unmeasured_run() -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = interleaved_seconds(calls, 2, torch.device("cpu"))
    assert "".join(order) == "aabbaabb"
    assert [len(each) for each in seconds] == [2, 2]
    assert min(map(min, seconds)) >= 0


def test_onnx_runtime_runs_the_same_operation() -> None:
    module = make_operation("dil_conv_3x3", 4, 2, affine=True).eval()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    call = call_of(module, (4, 9, 9), compute=CPU, backend="onnxruntime", batch_size=2)
    (ours,) = call()  # type: ignore[misc]
    with torch.no_grad():
        np.testing.assert_allclose(ours, module(x).numpy(), atol=1e-5)
    (seconds,) = seconds_of_calls([call], 2, CPU, "onnxruntime")
    assert len(seconds) == 2
    with pytest.raises(ConfigError, match="no CUDAExecutionProvider; give --device cpu"):
        onnx_session(b"", device="cuda")


def test_a_table_that_was_written_is_read_unchanged(table: LatencyTable, tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", table)
    assert read_table(tmp_path / "table.json") == table


def changed(table: LatencyTable, **changes: Any) -> str:
    return json.dumps({**dataclasses.asdict(table), **changes})


def first_candidate(table: LatencyTable, **changes: Any) -> str:
    first, *others = dataclasses.asdict(table)["candidates"]
    return changed(table, candidates=[{**first, **changes}, *others])


def without_median(table: LatencyTable) -> str:
    first, *others = dataclasses.asdict(table)["candidates"]
    return changed(table, candidates=[{k: v for k, v in first.items() if k != "median_ms"}, *others])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda table: "no table", "(Invalid JSON: expected ident at line 1 column 2)"),
        (lambda table: "[1]", "(Input should be an object"),
        (
            lambda table: first_candidate(table, median_ms=-1),
            "(candidates.0.median_ms: Input should be greater",
        ),
        (lambda table: first_candidate(table, median_ms=float("nan")), "(candidates.0.median_ms: "),
        (lambda table: first_candidate(table, upper_ms=float("inf")), "(candidates.0.upper_ms: "),
        (without_median, "(candidates.0.median_ms: Field required)"),
        (lambda table: changed(table, candidates=[]), "(candidates: Tuple should have at least 1 item"),
        (lambda table: changed(table, version=2), "(version: Input should be 1)"),
        (lambda table: changed(table, picture=[3, 16]), "(picture.2: Field required)"),
        (
            lambda table: changed(table, candidates=2 * dataclasses.asdict(table)["candidates"]),
            "table.json has a candidate twice",
        ),
    ],
)
def test_a_broken_table_is_refused_in_one_line(
    content: Any, says: str, table: LatencyTable, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    file.write_text(content(table))
    with pytest.raises(ConfigError) as caught:
        read_table(file)
    assert str(caught.value).startswith(f"search.latency_table: {file} ")
    assert says in str(caught.value)
    assert str(caught.value).endswith("; measure it again with istanas latency")
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(
            ConfigError, match=r"search\.latency_table: .* cannot be read \(.*give a file that"
        ):
            read_table(file)


def test_a_table_of_another_machine_is_noticed(table: LatencyTable, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    config = load(None, [f"search.latency_table={file}", f"runtime.threads={table.machine.threads}"])
    write_table(file, table)
    assert table_warnings(config) == []
    there = dataclasses.replace(table.machine, device_name="phone", threads=64, versions={"torch": "1.0"})
    write_table(file, dataclasses.replace(table, machine=there))
    (line,) = table_warnings(config)
    assert "device phone (here " in line
    assert f"threads 64 (here {table.machine.threads}); torch 1.0 (here {torch.__version__})" in line
    if not torch.cuda.is_available():
        there = dataclasses.replace(table.machine, device="cuda", device_name="H200")
        write_table(file, dataclasses.replace(table, machine=there))
        assert table_warnings(config) == [
            "search.latency_table: latencies of another machine: device H200 (here none)"
        ]
    assert table_warnings(load(None)) == []


def test_doubtful_latencies_are_noticed(table: LatencyTable, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    zeros = tuple(dataclasses.replace(each, median_ms=0.0, lower_ms=0.0) for each in table.candidates)
    write_table(file, dataclasses.replace(table, batch_size=8, candidates=zeros))
    config = load(None, [f"search.latency_table={file}", f"runtime.threads={table.machine.threads}"])
    assert table_warnings(config) == [
        "search.latency_table: latencies of batches of 8 pictures, not of one picture",
        "search.latency_table: all latencies of candidates are 0, so that all networks seem equally fast; measure it "
        "again with istanas latency",
    ]
