"""After the first epoch, neither training nor validation nor their progress bar waits for a GPU.

On a GPU, torch itself refuses to wait. Without one, the same epochs run on the CPU, where operations whose result the
host needs, and reads of a tensor, are refused. Copies to the device, which wait if their memory is not pinned, are only
noticed on a GPU.
"""

import io
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from istanas.data import load_dataset
from istanas.search import OneStageSearch, TwoStageSearch
from istanas.space import CellSpace, random_genotype
from istanas.training import Metrics, Totals
from pipeline.config.load import load
from pipeline.jobs.progress import EpochBar
from pipeline.training import epochs
from pipeline.training.epoch_record import FolderStore, Progress
from pipeline.training.loop import retrain_worker, search_worker
from pipeline.training.observer import Silent

ATEN = torch.ops.aten
READ_BY_THE_HOST = {
    ATEN._local_scalar_dense,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN.equal,
    ATEN.is_nonzero,
    ATEN._unique2,
}
TAKE_MASKS = {ATEN.index, ATEN.index_put, ATEN.index_put_}
READINGS = ("tolist", "numpy", "cpu", "__array__")  # they read the host's memory without an operator
# Allowed callers: optimisers, which are fused on a GPU and read nothing, and the plan of an epoch's batches, which
# stays on the host.
EXEMPT = (("/torch/optim/", None), ("/istanas/data/loading.py", "batches"))
# The passes of each job; each one ends with one reading of its figures.
PASSES: dict[str, list[tuple[Any, str]]] = {
    "two-stage": [(TwoStageSearch, "train_epoch"), (TwoStageSearch, "validate")],
    "one-stage": [(OneStageSearch, "train_epoch"), (OneStageSearch, "validate")],
    "retrain": [(epochs, "train_target_epoch"), (epochs, "evaluate")],
}


def refuse(what: object) -> None:
    for frame in traceback.extract_stack():
        if any(file in frame.filename and name in (None, frame.name) for file, name in EXEMPT):
            return
    raise AssertionError(f"{what} would wait for a GPU")


class Refusing(TorchDispatchMode):
    """Refuses operators on the CPU that would wait for a GPU."""

    def __enter__(self) -> Any:
        self._readings = pytest.MonkeyPatch()
        for name in READINGS:
            self._readings.setattr(Tensor, name, self._refusing(name, getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._readings.undo()

    @staticmethod
    def _refusing(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*arguments: Any, **options: Any) -> Any:
            refuse(f"Tensor.{name}")
            return read(*arguments, **options)

        return refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.overloadpacket in TAKE_MASKS and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        repeats = func is ATEN.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if masks or repeats or func.overloadpacket in READ_BY_THE_HOST:
            refuse(func)
        return func(*args, **kwargs)


class CudaRefusing(AbstractContextManager["CudaRefusing"]):
    """Makes torch refuse to wait for the GPU."""

    def __enter__(self) -> "CudaRefusing":
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Guard(Silent):
    """An observer with which no pass after the first epoch may wait, except to read its figures once at its end.

    The first epoch allocates memory and moves the pictures to the device. The bar, which would read the figures at
    every step, gets none, as on a GPU.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, job: str, refusing: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.guarded_steps = self.passes = self.readings = 0
        self.read: list[Metrics | None] = []
        self._warm, self._refusing, self._inside = False, refusing, ExitStack()
        console = Console(file=io.StringIO(), force_terminal=True)
        self._bar = EpochBar(console, job, 2, seconds_between_readings=0.0)
        for owner, name in PASSES[job]:
            monkeypatch.setattr(owner, name, self._guarded(getattr(owner, name)))
        monkeypatch.setattr(Totals, "metrics", self._counted(Totals.metrics))

    def _guarded(self, one_pass: Callable[..., Metrics]) -> Callable[..., Metrics]:
        def guarded(*arguments: Any, **options: Any) -> Metrics:
            if not self._warm:
                return one_pass(*arguments, **options)
            self.passes += 1
            with self._inside:
                self._inside.enter_context(self._refusing())
                return one_pass(*arguments, **options)

        return guarded

    def _counted(self, metrics: Callable[..., Metrics]) -> Callable[..., Metrics]:
        def counted(*arguments: Any, **options: Any) -> Metrics:
            self.readings += self._warm
            self._inside.close()
            return metrics(*arguments, **options)

        return counted

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self.guarded_steps += self._warm
        if not self._warm and step == n_steps:
            self.read.append(read())
        self._bar.step(epoch, step, n_steps, read if self._refusing is CudaRefusing else lambda: None)

    def epoch_done(self, progress: Progress) -> None:
        self._warm = True

    def __enter__(self) -> "Guard":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def run_tiny(job: str, device: str, observer: Guard, folder: Path) -> None:
    """Run some epochs with augmentation, clipping, drop path and an auxiliary head."""
    tiny = "init_channels: 2, layers: 3, cutout: 2"
    two_stage = f"epochs: 2, batch_size: 64, max_pictures: 600, {tiny}"
    trained = f"{tiny}, auxiliary_weight: 0.4, drop_path: 0.2"
    one_stage = f"max_search_epochs: 1, train_epochs: 1, batch_size: 256, {trained}"
    config = load(
        None,
        [
            f"method={'one_stage' if job == 'one-stage' else 'two_stage'}",
            f"search={{{one_stage if job == 'one-stage' else two_stage}}}",
            f"retrain={{epochs: 2, batch_size: 256, test_every: 1, {trained}}}",
            "space.nodes=2",
            "data={name: digits, crop_padding: 1, horizontal_flip: true, holdout: 0.1}",
            f"runtime={{threads: 1, device: {device}}}",
        ],
    )
    digits, store = load_dataset("digits"), FolderStore(folder)
    with observer:
        if job == "retrain":
            genotype = random_genotype(1, CellSpace(n_nodes=2))
            done = retrain_worker(config, digits, store, observer, genotype)
        else:
            done = search_worker(config, digits, store, observer)
    assert done.epochs == (3 if job == "one-stage" else 2)
    assert observer.guarded_steps >= 4
    # Training and validation in each epoch but the first; a retraining tests too.
    assert observer.passes == {"two-stage": 2, "one-stage": 4, "retrain": 3}[job]
    tests = (
        1 if job == "one-stage" else 0
    )  # after its last epoch, not guarded: the pictures come to the device
    assert observer.readings == observer.passes + tests, "figures are read once a pass"


@pytest.mark.parametrize("job", PASSES)
def test_no_pass_reads_a_value_that_a_gpu_would_still_compute(
    monkeypatch: pytest.MonkeyPatch, job: str, tmp_path: Path
) -> None:
    observer = Guard(monkeypatch, job, Refusing)
    run_tiny(job, "cpu", observer, tmp_path)
    (metrics,) = observer.read
    assert metrics is not None
    assert metrics.loss > 0


@pytest.mark.parametrize("owner", [TwoStageSearch, OneStageSearch])
def test_figures_read_at_every_step_are_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: Any, tmp_path: Path
) -> None:
    job = "two-stage" if owner is TwoStageSearch else "one-stage"
    name = "weight_step" if owner is TwoStageSearch else "step"
    step = getattr(owner, name)

    def reading(search: Any, batch: Any, totals: Totals) -> None:
        step(search, batch, totals)
        totals.metrics()

    monkeypatch.setattr(owner, name, reading)
    observer = Guard(monkeypatch, job, Refusing)
    with pytest.raises(AssertionError, match="once a pass"):
        run_tiny(job, "cpu", observer, tmp_path)


def test_counting_top5_reads_nothing() -> None:
    totals, logits, target = Totals(torch.device("cpu")), torch.rand(4, 12), torch.arange(4)
    with Refusing():
        totals.add(torch.tensor(1.0), logits, target)
    assert totals.metrics().top5 is not None


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.cpu(),
    ],
)
def test_an_operation_that_would_wait_is_refused(read: Callable[[Tensor], object]) -> None:
    x = torch.ones(1)
    with Refusing(), pytest.raises(AssertionError, match="would wait for a GPU"):
        read(x)
    assert x.tolist() == [1], "only there"


@pytest.mark.gpu
@pytest.mark.parametrize("job", PASSES)
def test_no_pass_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch, job: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    observer = Guard(monkeypatch, job, CudaRefusing)
    run_tiny(job, "cuda", observer, tmp_path)
    assert observer.read == [None], "figures of a GPU's epoch are read at its end"
