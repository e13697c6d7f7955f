"""Between the first and the last step of an epoch nothing waits for a GPU: not data, steps, figures or the bar.

On a GPU torch itself refuses to wait. Without one, the same epochs run on the CPU, and the operations whose
result the host has to know, for which it would have to wait, are refused.
"""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from istanas.data import load_dataset
from istanas.space import CellSpace, random_genotype
from istanas.training import Metrics
from pipeline.checkpoint import FolderStore
from pipeline.config import load
from pipeline.worker import Silent, retrain_worker, search_worker

ATEN = torch.ops.aten
READ_BY_THE_HOST = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero}
JOBS = ["two-stage", "one-stage", "retrain"]


class Refusing(TorchDispatchMode):
    """Refuses what would wait on a GPU. Optimisers are let through: those on a GPU are fused and read nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket is ATEN.index and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        waits = masks or func.overloadpacket in READ_BY_THE_HOST
        if waits and not any("/torch/optim/" in frame.filename for frame in traceback.extract_stack()):
            raise AssertionError(f"{func} would wait for a GPU")
        return func(*args, **(kwargs or {}))


class CudaRefusing(AbstractContextManager["CudaRefusing"]):
    """Has torch refuse to wait for the GPU."""

    def __enter__(self) -> "CudaRefusing":
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Guard(Silent):
    """An observer under which nothing may wait from the end of an epoch's first step to the end of its last."""

    def __init__(self, refusing: Callable[[], AbstractContextManager[Any]]) -> None:
        self.steps, self.read = 0, list[Metrics | None]()
        self._refusing, self._inside = refusing, ExitStack()

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self.steps += 1
        if step == 1:
            self._inside.enter_context(self._refusing())
        if step == n_steps:
            self._inside.close()
            self.read.append(read())

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def __enter__(self) -> "Guard":
        return self


def run_tiny(job: str, device: str, observer: Guard, folder: Path) -> None:
    """Two epochs with everything that a step can have: augmentation, clipping, drop path, an auxiliary head."""
    tiny = "init_channels: 2, layers: 3, cutout: 2"
    two_stage = f"epochs: 2, batch_size: 64, max_pictures: 600, {tiny}"
    trained = f"{tiny}, auxiliary_weight: 0.4, drop_path: 0.2"
    one_stage = f"max_search_epochs: 1, train_epochs: 1, batch_size: 256, {trained}"
    config = load(
        None,
        [
            f"method={'one_stage' if job == 'one-stage' else 'two_stage'}",
            f"search={{{one_stage if job == 'one-stage' else two_stage}}}",
            f"retrain={{epochs: 2, batch_size: 256, {trained}}}",
            "space.nodes=2",
            "data={name: digits, crop_padding: 1, horizontal_flip: true}",
            f"runtime={{threads: 1, device: {device}}}",
        ],
    )
    digits, store = load_dataset("digits"), FolderStore(folder)
    with observer:
        if job == "retrain":
            genotype = random_genotype(1, CellSpace(n_nodes=2))
            history = retrain_worker(config, digits, store, observer, genotype)
        else:
            history = search_worker(config, digits, store, observer)
    assert len(history) == len(observer.read) == 2
    assert observer.steps >= 2 * 4


@pytest.mark.parametrize("job", JOBS)
def test_no_step_reads_what_a_gpu_would_have_to_finish_first(job: str, tmp_path: Path) -> None:
    observer = Guard(Refusing)
    run_tiny(job, "cpu", observer, tmp_path)
    assert all(metrics is not None and metrics.loss > 0 for metrics in observer.read)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_would_wait_is_refused(read: Callable[[Tensor], object]) -> None:
    with Refusing(), pytest.raises(AssertionError, match="would wait for a GPU"):
        read(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("job", JOBS)
def test_no_step_waits_for_a_gpu(job: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    observer = Guard(CudaRefusing)
    run_tiny(job, "cuda", observer, tmp_path)
    assert observer.read == [None, None], "figures of a GPU's epoch are read at its end"
