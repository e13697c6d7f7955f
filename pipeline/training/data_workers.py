"""Processes that decode pictures (`runtime.data_workers`): the loss of one is one line, not an endless wait."""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from istanas.errors import IstanasError
from pipeline.base.socket_paths import shorten_data_worker_sockets

SHARED_MEMORY = Path("/dev/shm")
BATCH_NOT_SENT = 74  # exit code of a worker, EX_IOERR
# How torch's messages about its workers begin, and nothing else.
OF_WORKERS = ("DataLoader worker (pid", "Pin memory thread exited")


@contextlib.contextmanager
def noticing_their_loss(workers: int) -> Iterator[None]:
    """Inside, the loss of a data worker is an error of one line.

    A worker that can't send a batch, because /dev/shm is full, ends: by default, Python prints a traceback, drops the
    batch and lets the worker live, and the process that trains would wait for that batch for ever.

    Args:
        workers: as `runtime.data_workers`.

    Raises:
        IstanasError: a data worker was lost.
    """
    if workers == 0:
        yield
        return
    shorten_data_worker_sockets()
    queue: Any = Queue  # workers are forked, and have what is set here
    before, queue._on_queue_feeder_error = queue._on_queue_feeder_error, staticmethod(_end_worker)
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(OF_WORKERS):
            raise
        raise IstanasError(
            f"runtime.data_workers is {workers}: a process that decodes pictures was lost ({_reason(error)}); enlarge "
            "/dev/shm (docker run --shm-size=2g), free memory, or set runtime.data_workers=0; the same command resumes"
        ) from error
    finally:
        queue._on_queue_feeder_error = staticmethod(before)


def _end_worker(_error: Exception, _batch: object) -> None:
    """Called, in the process that sends, where something was not sent."""
    if get_worker_info() is None:
        traceback.print_exc()  # as Python does
    else:
        os._exit(BATCH_NOT_SENT)


def _reason(error: RuntimeError) -> str:
    """What torch says, in a few words, and how much shared memory there is: most often it is too little."""
    cause = (
        error.__cause__ if str(error.__cause__).startswith(OF_WORKERS) else error
    )  # which knows the signal
    what = " ".join(str(cause).split()).partition(". ")[0].rstrip(".")
    if not SHARED_MEMORY.is_dir():
        return what
    size = shutil.disk_usage(SHARED_MEMORY)
    return f"{what}; /dev/shm has {size.total / 1e6:.0f} MB, {size.free / 1e6:.0f} MB of them free"
