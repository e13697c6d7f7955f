"""The measurement of a table of latencies: all candidates of a search space, and some random networks.

`istanas.latency` describes what the table means, and `pipeline.training.latency_tables` reads and writes its file.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor, nn

from istanas.latency import (
    N_CHECKS,
    N_REFERENCES,
    CandidateLatency,
    Latency,
    LatencyPredictor,
    LatencyTable,
    Machine,
    NetworkLatency,
    describe_space,
    fit_references,
    network_seeds,
    variants_of,
)
from istanas.nets import to_channels_last
from istanas.space import NetworkSize, SearchSpace
from istanas.training import Compute
from pipeline.base.onnx_sessions import onnx_session
from pipeline.runs.environment import cpu_model
from pipeline.training.profiling import interleaved_seconds

Backend = Literal["torch", "onnxruntime"]
RUNS, WARM_UP = 30, 3


def measure_latencies(
    space: SearchSpace,
    size: NetworkSize,
    shape: tuple[int, int, int],
    compute: Compute,
    *,
    backend: Backend = "torch",
    batch_size: int = 1,
    runs: int = RUNS,
    checks: int = N_CHECKS,
    say: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Measure the latencies of all candidates of a search space, and of some random networks.

    The runs of all of them are interleaved, so that a change of the machine's speed affects all in the same way.

    Args:
        space: The search space.
        size: The size of the networks.
        shape: (C, H, W) of a picture.
        compute: Device and precision. The number of CPU threads is torch's current one.
        backend: What executes the networks.
        batch_size: Pictures in a batch, >= 1.
        runs: Number of measured runs, >= 2.
        checks: Number of random networks that are measured only to check the predictions, >= 1.
        say: Receives a line before the runs.

    Raises:
        ConfigError: If the space does not say where its candidates stand, or the backend lacks the device.
    """
    variants, seeds = variants_of(space, size, shape), network_seeds(N_REFERENCES + checks)
    genotypes = [space.random(seed) for seed in seeds]
    with torch.random.fork_rng(devices=[]):
        networks: list[nn.Module] = [space.target(genotype, size).eval() for genotype in genotypes]
    prepare = functools.partial(call_of, compute=compute, backend=backend, batch_size=batch_size)
    calls = [
        *(prepare(module, variant.input) for variant, module in variants.items()),
        *(prepare(network, shape) for network in networks),
    ]
    say(f"measuring {len(variants)} candidates and {len(networks)} networks, {runs} runs each")
    seconds = seconds_of_calls(calls, runs, compute, backend)
    found = [Latency.of(each) for each in seconds]
    candidates = tuple(
        CandidateLatency(**asdict(latency), **variant._asdict())
        for variant, latency in zip(variants, found, strict=False)
    )
    measured = tuple(
        NetworkLatency(**asdict(latency), seed=seed)
        for seed, latency in zip(seeds, found[len(variants) :], strict=True)
    )
    references = measured[:N_REFERENCES]
    parts = LatencyPredictor(space, size, shape, {each.variant: each.median_ms for each in candidates}).parts
    fixed, scale = fit_references(
        [(each.median_ms, *parts(g)) for each, g in zip(references, genotypes, strict=False)]
    )
    return LatencyTable(
        machine=machine_here(backend, compute.device.type, torch.get_num_threads(), _dtype(compute, backend)),
        space=describe_space(space),
        network=size,
        picture=shape,
        batch_size=batch_size,
        runs=runs,
        fixed_ms=fixed,
        scale=scale,
        candidates=candidates,
        references=references,
        checks=measured[N_REFERENCES:],
    )


def call_of(
    module: nn.Module, shape: tuple[int, int, int], *, compute: Compute, backend: Backend, batch_size: int
) -> Callable[[], object]:
    """Return a function that runs a module on random input.

    Args:
        module: The module in eval mode, which is moved to the device.
        shape: (C, H, W) of its input.
        compute, backend, batch_size: See `measure_latencies`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *shape, generator=generator)
    if backend == "onnxruntime":
        session = onnx_session(_as_onnx(module, x), torch.get_num_threads(), compute.device.type)
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, feed)
    to_channels_last(module.to(compute.device))
    x = x.to(compute.device, memory_format=torch.channels_last)
    return lambda: module(x)


def seconds_of_calls(
    calls: Sequence[Callable[[], object]], runs: int, compute: Compute, backend: Backend
) -> list[list[float]]:
    """Return the seconds of each run of each call of `call_of`, after some runs that are not measured.

    The median time of an empty call is subtracted, because a network calls its candidates without it.
    """
    empty = call_of(nn.Identity().eval(), (1, 1, 1), compute=compute, backend=backend, batch_size=1)
    # ONNX Runtime returns when the GPU has finished. Only torch's work is timed with its events.
    clock = compute.device if backend == "torch" else torch.device("cpu")
    with torch.inference_mode(), compute.autocast():
        interleaved_seconds([empty, *calls], WARM_UP, clock)
        overhead, *seconds = interleaved_seconds([empty, *calls], runs, clock)
    least = statistics.median(overhead)
    return [[max(each - least, 0.0) for each in times] for times in seconds]


def _as_onnx(module: nn.Module, x: Tensor) -> bytes:
    exported = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert exported is not None
    model: bytes = exported.model_proto.SerializeToString()
    return model


def _dtype(compute: Compute, backend: Backend) -> str:
    dtype = compute.autocast_dtype if backend == "torch" else None
    return str(dtype or torch.float32).removeprefix("torch.")


def machine_here(backend: Backend, device: str, threads: int, dtype: str) -> Machine:
    """Return this machine; its device has no name if there is no GPU.

    Args:
        backend: See `measure_latencies`.
        device: "cpu" or "cuda".
        threads: CPU threads.
        dtype: Type of the computation.
    """
    versions = {"torch": str(torch.__version__)}
    if backend == "onnxruntime":
        try:
            versions["onnxruntime"] = str(importlib.import_module("onnxruntime").__version__)
        except ImportError:
            versions["onnxruntime"] = ""
    name = cpu_model()
    if device == "cuda":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Machine(backend, "cuda" if device == "cuda" else "cpu", name, threads, dtype, versions)


def spread(latencies: Sequence[Latency]) -> float:
    """Return the median over latencies of the distance of their quartiles, relative to their median.

    Example:
        >>> spread([Latency(2.0, 1.5, 2.5), Latency(4.0, 4.0, 4.0), Latency(1.0, 0.9, 1.1)])
        0.2
    """
    return round(statistics.median((e.upper_ms - e.lower_ms) / max(e.median_ms, 1e-9) for e in latencies), 6)
