"""Work on many files, distributed over processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from istanas.errors import DataError

Progress = Callable[[int, int], None]
"""Receives (files done, files in total)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pool:
    """How work on files is distributed over processes.

    Args:
        chunk: Files per task. A task of 500 small pictures takes about 50 ms and returns about 1.5 MB.
        threshold: With fewer files than this, no process is started, because that would cost more than it saves.
        processes: Number of processes; by default one per usable core.
        field: The setting or argument that names the files, for error messages.
    """

    chunk: int = 500
    threshold: int = 2000
    processes: int | None = None
    field: str = "data.root"

    def chunks(self, paths: Sequence[Item]) -> list[Sequence[Item]]:
        """Cut the paths into tasks.

        Example:
            >>> Pool(chunk=2).chunks(["a", "b", "c"])
            [['a', 'b'], ['c']]
        """
        return [paths[start : start + self.chunk] for start in range(0, len(paths), self.chunk)]

    def map(
        self, work: Callable[..., Result], paths: Sequence[Item], *arguments: object
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield (chunk, `work(chunk, *arguments)`) for the chunks of the paths, in order.

        Args:
            work: A module-level function.
            paths: The files, or other items of work.
            arguments: Further arguments, the same for every chunk.

        Raises:
            DataError: If a process was killed.
        """
        chunks = self.chunks(paths)
        processes = self.processes or _usable_cores()
        if len(paths) < self.threshold or processes == 1:
            yield from ((chunk, work(chunk, *arguments)) for chunk in chunks)
            return
        # Decoding small pictures mostly runs Python code, where threads would wait for the interpreter lock.
        executor = ProcessPoolExecutor(min(processes, len(chunks)), initializer=_end_with_parent)
        try:
            results = executor.map(work, chunks, *([argument] * len(chunks) for argument in arguments))
            yield from zip(chunks, results, strict=True)
        except BrokenProcessPool as error:
            raise DataError(
                "a decoding process was killed", field=self.field, remedy="free some memory and try again"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


DEFAULT_POOL = Pool()


def _end_with_parent() -> None:
    """End this process of a pool as soon as its parent is killed.

    Otherwise, it would wait for tasks for ever, with its memory and the files that it has inherited.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
