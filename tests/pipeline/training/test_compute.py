"""Device, precision and threads of a job, and what follows from them."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.space import PUBLISHED
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.config.load import load
from pipeline.config.schema import RuntimeSettings
from pipeline.config.threads import usable_cores
from pipeline.training.build import build_retraining, build_search, network_cost
from pipeline.training.compute import choose_compute, compute_for, describe_place, set_float32_precision
from tests.pipeline.training.small_jobs import (
    GENOTYPE,
    Watcher,
    retrain,
    search,
    tiny,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "precision", "gpus", "expected"),
    [
        ("auto", "auto", 0, Compute(CPU)),
        ("auto", "fp32", 0, Compute(CPU)),
        ("cpu", "auto", 4, Compute(CPU)),
        ("auto", "auto", 1, Compute(CUDA, torch.bfloat16)),
        ("cuda", "auto", 8, Compute(CUDA, torch.bfloat16)),
        ("auto", "bf16", 1, Compute(CUDA, torch.bfloat16)),
        ("auto", "fp32", 1, Compute(CUDA)),
    ],
)
def test_device_precision_and_backend_follow_from_settings_and_gpus(
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "fp32", "bf16"],
    gpus: int,
    expected: Compute,
) -> None:
    compute = choose_compute(RuntimeSettings(device=device, precision=precision), gpus)
    assert compute == expected
    assert compute.backend == ("gloo" if compute.device == CPU else "nccl")


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_only_bf16_lets_gpus_round_float32_to_tf32(precision: Literal["auto", "fp32"]) -> None:
    """The flags are set in this process, where they concern nothing, and put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_float32_precision(choose_compute(RuntimeSettings(precision=precision), gpus=1))
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert flags == (("high", True) if precision == "auto" else ("highest", False))
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "auto")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    ("override", "gpus", "says"),
    [
        (
            "runtime.device=cuda",
            0,
            "runtime.device: cuda requires a GPU, but none is usable here; choose cpu or auto",
        ),
        (
            "runtime.precision=bf16",
            0,
            "runtime.precision: bf16 needs a GPU, and none is used here; choose fp32 or auto",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(override: str, gpus: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_compute(tiny("runtime.device=auto", override).runtime, gpus)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_compute_for_sets_up_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        compute = compute_for(tiny("runtime.device=auto", "runtime.threads=2").runtime)
        assert torch.get_num_threads() == 2
        assert compute.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        compute_for(tiny("runtime.threads=null").runtime)
        assert torch.get_num_threads() == usable_cores()
        compute_for(tiny().runtime)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    auto = "runtime.device=auto"
    assert compute_for(tiny(auto).runtime).autocast_dtype is torch.bfloat16
    assert compute_for(tiny(auto, "runtime.precision=fp32").runtime).autocast_dtype is None
    assert compute_for(tiny("runtime.device=cpu").runtime).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("job", ["search", "retrain"])
def test_the_same_loop_runs_on_a_gpu(few: ImageDataset, tmp_path: Path, job: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    watcher = Watcher()
    history = (search if job == "search" else retrain)(tiny("runtime.device=cuda"), few, tmp_path, watcher)
    losses = [record.metrics["train/loss"] for record in history]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert any("cuda" in text for text in watcher.notes)


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_says_where_it_runs_before_it_starts(few: ImageDataset, tmp_path: Path, job: str) -> None:
    watcher = Watcher()
    (search if job == "search" else retrain)(tiny(f"{job}.epochs=1"), few, tmp_path, watcher)
    place = f"in this process, cpu, 1 thread, {count(usable_cores(), 'core')} on this machine"
    assert watcher.notes == [place] == [describe_place(Compute(CPU), Ranks())]


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_reaches_every_network(few: ImageDataset, on: bool) -> None:
    setting, compute, ranks = f"runtime.activation_checkpointing={str(on).lower()}", Compute(CPU), Ranks()
    config = tiny(setting)
    one_stage = load(None, [setting, "method=one_stage", "search={init_channels: 2, layers: 3}"])
    assert config.method == "two_stage"
    assert one_stage.method == "one_stage"
    nets = (
        build_search(config, few, compute, ranks).supernet,
        build_search(one_stage, few, compute, ranks).supernet,
        build_retraining(config, GENOTYPE, few, compute)[0],
    )
    assert [net.activation_checkpointing for net in nets] == [on] * 3


def test_the_cost_is_that_of_the_retrained_network(digits: ImageDataset) -> None:
    config = load(None)
    dataset = dataclasses.replace(digits, channels=3, height=32, width=32)
    assert network_cost(config, config.retrain, dataset, PUBLISHED["ISTA_twostage"]).params == 3_316_726
    one_stage = load(None, ["method=one_stage"])
    assert network_cost(one_stage, one_stage.search, dataset, PUBLISHED["ISTA_onestage"]).params == 3_371_806
