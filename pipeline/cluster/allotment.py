"""What each worker of a job gets: how many workers, threads of each, and which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from istanas.errors import IstanasError
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.config.schema import RuntimeSettings
from pipeline.config.workers import Node, WorkerRange, threads_per_worker, usable_cores, workers_that_fit
from pipeline.training.compute import choose_compute


@dataclass(frozen=True)
class Allotment:
    """What a job's workers get.

    Args:
        workers: how many.
        threads: of each worker, and the cores that Ray sets aside for it.
        compute: device, backend and precision, chosen for all.
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
    """For how many workers there is enough, wherever it lies."""
    return min(int(free.get(name, 0) // each) for name, each in allotment.bundle.items())


def allotment(settings: RuntimeSettings, nodes: Sequence[Node], *, may_come: bool = False) -> Allotment:
    """Workers, threads and device of a job on these nodes.

    Args:
        settings: what is asked for.
        nodes: what there is.
        may_come: GPUs that are asked for and not there are no mistake yet: the cluster may get them.
    """
    workers = settings.worker_range
    gpus = sum(node.gpus for node in nodes)
    if may_come and settings.device == "cuda":
        gpus = max(gpus, 1)
    compute = choose_compute(settings, gpus)
    gpu = compute.device.type == "cuda"
    threads = settings.threads
    if threads is None:  # of machines that have yet to come, one core is asked for
        to_come = gpu and all(node.gpus == 0 for node in nodes)
        threads = 1 if to_come else threads_per_worker(nodes, workers.maximum, gpu)
    return Allotment(workers, threads, compute)


def check_machine(settings: RuntimeSettings) -> None:
    """Refuse, before Ray is started here, what this machine can never hold: nothing is there to be waited for.

    More workers than cores take turns, up to two a core; what sets `runtime.threads` may not exceed the cores.

    Raises:
        IstanasError: with what there is and what is asked for.
    """
    here = this_machine()
    cores, gpus = here.cpus, here.gpus
    workers = settings.worker_range.minimum
    asked = allotment(settings, [Node(max(cores, workers), gpus)])
    fit = workers_that_fit([Node(cores, gpus)], asked.threads, asked.gpu)
    if settings.threads is None and not asked.gpu:
        fit = 2 * cores
    if workers > fit:
        raise IstanasError(
            f"waiting is of no use: {describe_workers(workers, asked)} are asked for, this machine has "
            f"{count(cores, 'core')} and {count(gpus, 'GPU')}: lower --workers (or runtime.threads), or name a "
            "cluster with --address"
        )


def this_machine() -> Node:
    """What this machine has."""
    import torch

    return Node(usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


def describe_workers(number: int, allotment: Allotment) -> str:
    """What so many workers need, in words."""
    each = f"{count(allotment.threads, 'core')}{' and 1 GPU' if allotment.gpu else ''}"
    return f"{count(number, 'worker')} of {each}"


def cores_and_gpus(free: dict[str, float]) -> str:
    """Return resources, by Ray's names, in words."""
    return f"{count(int(free.get('CPU', 0)), 'core')}, {count(int(free.get('GPU', 0)), 'GPU')}"
