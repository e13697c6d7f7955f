"""The resources of a job's workers: their number, the threads of each, and the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from istanas.errors import IstanasError
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.config.schema import RuntimeSettings
from pipeline.config.threads import threads_per_worker, usable_cores
from pipeline.config.workers import Node, WorkerRange, workers_that_fit
from pipeline.training.compute import choose_compute


@dataclass(frozen=True)
class Allotment:
    """The resources of a job's workers.

    Args:
        workers: The number of workers.
        threads: The threads of each worker, and the cores that Ray reserves for it.
        compute: Device, backend and precision, the same for all workers.
    """

    workers: WorkerRange
    threads: int
    compute: Compute

    @property
    def gpu(self) -> bool:
        """Whether each worker has a GPU."""
        return self.compute.device.type == "cuda"

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one worker, by Ray's names."""
        return {"CPU": self.threads, **({"GPU": 1} if self.gpu else {})}


def workers_in_sum(free: dict[str, float], allotment: Allotment) -> int:
    """Return the number of workers that fit into the sum of free resources, ignoring their division into nodes."""
    return min(int(free.get(name, 0) // each) for name, each in allotment.bundle.items())


def allotment(settings: RuntimeSettings, nodes: Sequence[Node], *, may_come: bool = False) -> Allotment:
    """Return the workers, threads and device of a job on these nodes.

    Args:
        settings: The requested resources.
        nodes: The available nodes.
        may_come: Accept a request for GPUs that are missing now, because the cluster may add them.
    """
    workers = settings.worker_range
    gpus = sum(node.gpus for node in nodes)
    if may_come and settings.device == "cuda":
        gpus = max(gpus, 1)
    compute = choose_compute(settings, gpus)
    gpu = compute.device.type == "cuda"
    threads = settings.threads
    if threads is None:
        # For nodes that do not exist yet, request one core.
        missing = gpu and all(node.gpus == 0 for node in nodes)
        threads = 1 if missing else threads_per_worker(nodes, workers.maximum, gpu)
    return Allotment(workers, threads, compute)


def check_machine(settings: RuntimeSettings) -> None:
    """Reject more workers than this machine can ever run, before Ray starts and waits for them.

    At most two workers share a core. With `runtime.threads`, the threads may not exceed the cores.

    Raises:
        IstanasError: This machine is too small.
    """
    here = this_machine()
    cores, gpus = here.cpus, here.gpus
    workers = settings.worker_range.minimum
    requested = allotment(settings, [Node(max(cores, workers), gpus)])
    fit = workers_that_fit([Node(cores, gpus)], requested.threads, requested.gpu)
    if settings.threads is None and not requested.gpu:
        fit = 2 * cores
    if workers > fit:
        raise IstanasError(
            f"this machine is too small for {describe_workers(workers, requested)}: it has {count(cores, 'core')} and "
            f"{count(gpus, 'GPU')}",
            field="runtime.workers",
            remedy="lower --workers (or runtime.threads), or name a cluster with --address",
        )


def this_machine() -> Node:
    """Return the cores and GPUs of this machine."""
    import torch

    return Node(usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def cluster_nodes() -> list[Node]:
    """Return the cores and GPUs of the nodes that are alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


def describe_workers(number: int, allotment: Allotment) -> str:
    """Describe the resources of a number of workers."""
    each = f"{count(allotment.threads, 'core')}{' and 1 GPU' if allotment.gpu else ''}"
    return f"{count(number, 'worker')} of {each}"


def cores_and_gpus(free: dict[str, float]) -> str:
    """Describe the cores and GPUs in resources by Ray's names."""
    return f"{count(int(free.get('CPU', 0)), 'core')}, {count(int(free.get('GPU', 0)), 'GPU')}"
