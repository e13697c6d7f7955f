"""The actor that passes events and checkpoints between Ray Train's workers and the process that started them.

The actor runs in its own process. To keep that process small, this module imports no large packages.
"""

from __future__ import annotations

import asyncio
from typing import Any

# The kinds of the mailbox's own events. Posted events are pickles that only the user's process unpacks, so that the
# actor does not import torch.
OWN_KINDS = ("started", "checkpoint")


class Mailbox:
    """An asynchronous actor that holds the newest checkpoint, and new events for the user's process.

    Every group of workers has a token, by which late messages of a dead group are recognised and ignored.

    Args:
        newest: The checkpoint that workers start from, or None.
    """

    def __init__(self, newest: bytes | None) -> None:
        self._newest = newest
        self._token: str | None = None
        self._events: list[tuple[Any, ...]] = []
        self._arrived = asyncio.Event()
        self._answers: dict[tuple[str, int], asyncio.Future[bool]] = {}
        self._controller: Any = None

    # called by Ray Train's controller
    async def controlled_by(self, controller: Any) -> None:
        """Keep the handle of the controller that has just started."""
        self._controller = controller

    # called by workers
    async def begin(self, token: str, reservation: str) -> bytes | None:
        """Register a new group of workers and its reservation, and return the checkpoint that it starts from."""
        self._token = token
        self._add("started", reservation)
        return self._newest

    async def post(self, token: str | None, kind: str, payload: bytes) -> None:
        """Add an event for the user's process. Of consecutive steps, only the last is kept."""
        if token not in (None, self._token):
            return
        if kind == "step" and self._events and self._events[-1][0] == "step":
            self._events.pop()
        self._add(kind, payload)

    async def keep(self, token: str, epoch: int, data: bytes, line: bytes, offset: int, workers: int) -> bool:
        """Wait until a checkpoint and its epoch's line are on the disk, and return whether the workers continue."""
        if token != self._token:
            return False
        self._newest = data
        answer = self._answers[token, epoch] = asyncio.get_running_loop().create_future()
        self._add("checkpoint", epoch, data, line, offset, workers)
        return await answer

    # called by the user's process
    async def take(self, timeout: float) -> list[tuple[Any, ...]]:
        """Return the new events, after waiting at most `timeout` seconds for the first."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return []
        events, self._events = self._events, []
        self._arrived.clear()
        return events

    async def controller(self) -> Any:
        """Return the handle of the controller that started last, or None if none has."""
        return self._controller

    async def kept(self, epoch: int, should_continue: bool) -> None:
        """Confirm that the checkpoint of an epoch is on the disk, and say whether the workers continue."""
        for key in [key for key in self._answers if key[1] == epoch]:
            self._answers.pop(key).set_result(should_continue)

    def _add(self, *event: Any) -> None:
        self._events.append(event)
        self._arrived.set()
