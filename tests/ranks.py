"""Functions on several ranks, which are processes of a gloo group without Ray; and the bytes that they exchange."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from istanas.distributed import Ranks

SECONDS = 200
# Imported once in each test process, from which the ranks are forked. Each would take two seconds for its imports.
PRELOADED = ["torch.distributed", "torch.nn.parallel", "istanas.data", "istanas.nets", "istanas.search"]


@dataclass(frozen=True)
class Outcome:
    """The value that a function returned on a rank, or the "Class: message" of its exception."""

    returned: Any
    error: str
    trace: str

    @property
    def value(self) -> Any:
        assert not self.error, self.trace
        return self.returned


def run_ranks(functions: Sequence[Callable[[], Any]], size: int) -> list[list[Outcome]]:
    """Call functions one after another in `size` processes that form a process group.

    Args:
        functions: Functions of a module's top level. One that raises must leave the ranks in step for the next.
        size: Number of processes.

    Returns:
        The outcomes of each function, by rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(functions, rank, size, folder), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            assert process.exitcode is not None, "a rank hangs"
        by_rank = [pickle.loads((Path(folder) / f"rank{r}").read_bytes()) for r in range(size)]
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


def _run(functions: Sequence[Callable[[], Any]], rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    outcomes = []
    for function in functions:
        try:
            outcomes.append(Outcome(function(), "", ""))
        except Exception as error:
            outcomes.append(Outcome(None, f"{type(error).__name__}: {error}", traceback.format_exc()))
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(outcomes))
    dist.destroy_process_group()


class CountingRanks(Ranks):
    """Ranks that count all-reduced bytes, in a list that all of them share."""

    counted: list[int] = []  # noqa: RUF012

    def data_parallel(
        self, forward: Callable[..., Any], parameters: Sequence[nn.Parameter]
    ) -> Callable[..., Any]:
        def hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            buffer = bucket.buffer()
            self.counted.append(buffer.numel() * buffer.element_size())
            return allreduce_hook(state, bucket)

        replica: Any = super().data_parallel(forward, parameters)
        assert not replica.find_unused_parameters
        replica.register_comm_hook(None, hook)
        return replica
