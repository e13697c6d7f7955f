"""Device, precision and number of threads of a process that trains."""

from __future__ import annotations

import torch
import torch.distributed as dist

from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.config.schema import RuntimeSettings
from pipeline.config.workers import threads_in_process, usable_cores


def choose_compute(settings: RuntimeSettings, gpus: int) -> Compute:
    """Decide device, precision and (as `Compute.backend`) how workers talk: the only place that does.

    Args:
        settings: what is asked for.
        gpus: how many GPUs the job may use, here or on a cluster.

    Raises:
        ConfigError: if what is asked for can't be.
    """
    if settings.device == "cuda" and gpus == 0:
        raise ConfigError(
            "runtime.device is cuda, and no GPU is usable here: choose cpu or auto, or see `istanas doctor`"
        )
    device = torch.device("cuda" if gpus > 0 and settings.device != "cpu" else "cpu")
    if device.type == "cpu":
        if settings.precision == "bf16":
            raise ConfigError("runtime.precision is bf16, and there is no GPU here: choose fp32 or auto")
        return Compute(device)
    return Compute(device, None if settings.precision == "fp32" else torch.bfloat16)


def compute_for(settings: RuntimeSettings) -> Compute:
    """`choose_compute` for this process, which is then set up for it.

    Raises:
        ConfigError: if what is asked for can't be.
    """
    compute = choose_compute(settings, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    torch.set_num_threads(threads_in_process(settings.threads))
    if compute.device.type == "cuda":
        set_float32_precision(compute)
        torch.backends.cudnn.benchmark = True
    return compute


def set_float32_precision(compute: Compute) -> None:
    """Allow TF32 only if the job computes in bf16; with `precision: fp32`, products and convolutions are float32.

    torch's own default rounds the operands of cuDNN's convolutions to TF32's 10 mantissa bits.
    """
    tf32 = compute.autocast_dtype is not None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def describe_place(compute: Compute, ranks: Ranks) -> str:
    """One line for people: who computes, on what, with how many threads."""
    threads = f"{count(torch.get_num_threads(), 'thread')}, {count(usable_cores(), 'core')} on this machine"
    if not dist.is_initialized():
        return f"in this process, {compute.device.type}, {threads}"
    return f"{count(ranks.size, 'worker')} ({compute.device.type}, {compute.backend}), each {threads}"
