"""The GPU benchmark's loop on tiny pictures, on the CPU and, if there is one, on a GPU."""

import math
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from istanas.training import Compute
from pipeline.config.load import load
from pipeline.training.compute import compute_for
from tests.benchmarks import gpu
from tests.benchmarks.gpu import Loop, Speed, measure, published, random_pictures

PICTURES, BATCH = 72, 16  # halves of 36: two batches of 16, and one of 4


def tiny(device: str) -> tuple[Loop, Compute]:
    settings = ["init_channels=4", "layers=3", f"batch_size={BATCH}", "arch_lr=0.05", "epochs=50"]
    overrides = [f"search.{setting}" for setting in settings]
    config = load(None, [*overrides, f"runtime.device={device}", "runtime.threads=1", "data.crop_padding=1"])
    assert config.method == "two_stage"
    compute = compute_for(config.runtime)
    return Loop(config, random_pictures(PICTURES, 8), compute), compute


def assert_measured(loop: Loop, speed: Speed) -> None:
    """What holds on every device."""
    assert all(math.isfinite(v) and v > 0 for v in vars(speed).values())
    assert loop.search.epoch == 3, "a warm-up, a measured and a profiled epoch"
    assert all(p.device.type == loop.compute.device.type for p in loop.search.weights)


def test_the_loop_trains_on_full_batches_and_validates_on_all() -> None:
    loop, _ = tiny("cpu")
    before = [p.clone() for p in [*loop.search.supernet.active_parameters(), *loop.search.alphas]]
    assert loop.train() == 2 * 2 * BATCH
    assert loop.train(1) == 2 * BATCH
    assert loop.validate() == PICTURES // 2
    after = [*loop.search.supernet.active_parameters(), *loop.search.alphas]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_measured_on_a_cpu() -> None:
    loop, _ = tiny("cpu")
    assert_measured(loop, measure(loop))


def test_kernels_are_counted_once_and_annotations_are_not_counted() -> None:
    def event(name: str, start: int, end: int, **more: bool) -> FunctionEvent:
        return FunctionEvent(
            0, name, 0, start, end, device_type=DeviceType.CUDA, use_device="cuda", device_index=0, **more
        )

    events = [
        event("kernel", 0, 30),
        event("kernel", 50, 70),
        event("Optimizer.step", 0, 90, is_user_annotation=True),
        FunctionEvent(1, "aten::mm", 0, 0, 100, device_type=DeviceType.CPU, use_device="cuda"),
    ]
    assert gpu.computing_seconds(events, torch.device("cuda")) == pytest.approx(50e-6)


def test_the_projection_is_the_sum_of_its_parts() -> None:
    speed = Speed(
        pictures_per_second=10_000.0,
        validated_per_second=50_000.0,
        recovery_seconds=0.1,
        computing_share=0.5,
    )
    # 50 epochs of 50,000 pictures in training, 25,000 in validation, one recovery.
    assert speed.projected_seconds == pytest.approx(50 * (5 + 0.5 + 0.1))


def test_the_published_search_is_that_of_the_configuration_file(repo_root: Path) -> None:
    ours = published(256)
    theirs = load(repo_root / "tune_configs" / "two_stage_cifar10.yaml")
    assert ours.search == theirs.search
    assert (ours.data.crop_padding, ours.data.horizontal_flip) == (4, True)
    assert (ours.space, ours.search.max_epochs) == (theirs.space, gpu.EPOCHS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the benchmark would run")
def test_without_a_gpu_the_program_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out == "tests.benchmarks.gpu: skipped, torch finds no CUDA device here\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_gpu_measures_bf16_fused_optimisers_and_pictures_on_the_device() -> None:
    loop, compute = tiny("cuda")
    assert compute.autocast_dtype is torch.bfloat16
    assert torch.get_float32_matmul_precision() == "high"
    for optimizer in (loop.search.weight_optimizer, loop.search.alpha_optimizer):
        assert all(group["fused"] for group in optimizer.param_groups)
    speed = measure(loop)
    assert_measured(loop, speed)
    assert speed.computing_share < 1
    for batch in loop.batches.training("weights", loop.splits.training, 0):
        assert batch.images.device.type == "cuda"
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
