"""Error handling for the processes that decode pictures (`runtime.data_workers`)."""

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
BATCH_NOT_SENT = 74  # exit code of a worker that could not send a batch, EX_IOERR
# Torch has no error class for lost workers, so they are recognised by the start of the message.
WORKER_MESSAGES = ("DataLoader worker (pid", "Pin memory thread exited")


@contextlib.contextmanager
def report_lost_workers(workers: int) -> Iterator[None]:
    """Convert the loss of a data worker in this context to a one-line error.

    A worker that cannot send a batch, because /dev/shm is full, exits. By default, Python would drop the batch and keep
    the worker, and the training process would wait for that batch forever.

    Args:
        workers: `runtime.data_workers`.

    Raises:
        IstanasError: If a data worker was lost.
    """
    if workers == 0:
        yield
        return
    shorten_data_worker_sockets()
    queue: Any = Queue  # workers are forked, and so inherit the change
    before, queue._on_queue_feeder_error = queue._on_queue_feeder_error, staticmethod(_end_worker)
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(WORKER_MESSAGES):
            raise
        raise IstanasError(
            f"a process that decodes pictures was lost ({_reason(error)})",
            field="runtime.data_workers",
            remedy="enlarge /dev/shm (docker run --shm-size=2g), free memory, or set runtime.data_workers=0; the same "
            "command resumes",
        ) from error
    finally:
        queue._on_queue_feeder_error = staticmethod(before)


def _end_worker(_error: Exception, _batch: object) -> None:
    """Exit a data worker that failed to send; in other processes, print the traceback as Python does."""
    if get_worker_info() is None:
        traceback.print_exc()
    else:
        os._exit(BATCH_NOT_SENT)


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of torch's message, and the size of the shared memory, the most frequent cause."""
    # Only the cause, if there is one, names the signal.
    cause = error.__cause__ if str(error.__cause__).startswith(WORKER_MESSAGES) else error
    what = " ".join(str(cause).split()).partition(". ")[0].rstrip(".")
    if not SHARED_MEMORY.is_dir():
        return what
    size = shutil.disk_usage(SHARED_MEMORY)
    return f"{what}; /dev/shm has {size.total / 1e6:.0f} MB, {size.free / 1e6:.0f} MB of them free"
