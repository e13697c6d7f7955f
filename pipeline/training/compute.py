"""Device, precision and number of threads of a training process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.config.schema import RuntimeSettings
from pipeline.config.threads import threads_in_process, usable_cores

Forward = TypeVar("Forward", bound=Callable[..., Any])


def choose_compute(settings: RuntimeSettings, gpus: int) -> Compute:
    """Choose device, precision and (as `Compute.backend`) the workers' communication backend.

    This is the only place that makes the choice.

    Args:
        settings: The requested settings.
        gpus: Number of GPUs that the job may use, here or on a cluster.

    Raises:
        ConfigError: If the settings require a GPU and there is none.
    """
    if settings.device == "cuda" and gpus == 0:
        raise ConfigError(
            "cuda requires a GPU, but none is usable here",
            field="runtime.device",
            remedy="choose cpu or auto, or see `istanas doctor`",
        )
    device = torch.device("cuda" if gpus > 0 and settings.device != "cpu" else "cpu")
    if device.type == "cpu":
        if settings.precision == "bf16":
            raise ConfigError(
                "bf16 needs a GPU, and none is used here",
                field="runtime.precision",
                remedy="choose fp32 or auto",
            )
        return Compute(device)
    return Compute(device, None if settings.precision == "fp32" else torch.bfloat16)


def compute_for(settings: RuntimeSettings) -> Compute:
    """Call `choose_compute` for this process, and set up its threads and precision.

    Raises:
        ConfigError: If the settings require a GPU and there is none.
    """
    compute = choose_compute(settings, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    torch.set_num_threads(threads_in_process(settings.threads))
    if compute.device.type == "cuda":
        set_float32_precision(compute)
        torch.backends.cudnn.benchmark = True
    return compute


def set_float32_precision(compute: Compute) -> None:
    """Allow TF32 only if the job computes in bf16; with `precision: fp32`, products and convolutions use float32.

    By default, torch rounds the operands of cuDNN's convolutions to the 10 mantissa bits of TF32.
    """
    tf32 = compute.autocast_dtype is not None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def compiled(settings: RuntimeSettings, compute: Compute, forward: Forward) -> Forward:
    """Return a forward pass as `runtime.compile` requires it: compiled at its first call, or as it is.

    Args:
        settings: The settings.
        compute: The device. On a CPU, compilation requires a C++ compiler.
        forward: The forward pass of a network that does not change.

    Raises:
        ConfigError: If there is no compiler.
    """
    if not settings.compile:
        return forward
    if compute.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "torch.compile needs a C++ compiler on a CPU, and there is none",
            field="runtime.compile",
            remedy="install g++, or set it to false",
        )
    return cast(Forward, torch.compile(forward))


def describe_place(compute: Compute, ranks: Ranks) -> str:
    """Return a line for the user: number of workers, device, and threads."""
    threads = f"{count(torch.get_num_threads(), 'thread')}, {count(usable_cores(), 'core')} on this machine"
    if not dist.is_initialized():
        return f"in this process, {compute.device.type}, {threads}"
    return f"{count(ranks.size, 'worker')} ({compute.device.type}, {compute.backend}), each {threads}"
