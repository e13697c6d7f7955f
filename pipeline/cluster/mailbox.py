"""Between Ray Train's workers and the process that started them: what is new, and the newest checkpoint.

An actor of its own process, which is why nothing heavy is imported here.
"""

from __future__ import annotations

import asyncio
from typing import Any

# Of its own events; what is posted is a pickle that only the user's process unpacks, so that this one need not load
# what it does not read, torch above all.
OWN_KINDS = ("started", "checkpoint")


class Mailbox:
    """An asynchronous actor that holds the newest checkpoint and what is new for the user's process.

    Args:
        newest: checkpoint that workers start from, or None.

    Every group of workers has a token, so that what a dead group has sent too late is not taken for the new one's.
    """

    def __init__(self, newest: bytes | None) -> None:
        self._newest = newest
        self._token: str | None = None
        self._events: list[tuple[Any, ...]] = []
        self._arrived = asyncio.Event()
        self._answers: dict[tuple[str, int], asyncio.Future[bool]] = {}

    # for workers
    async def begin(self, token: str, places: str) -> bytes | None:
        """A new group of workers starts, on reserved places: where from?"""
        self._token = token
        self._add("started", places)
        return self._newest

    async def post(self, token: str | None, kind: str, payload: bytes) -> None:
        """Tell the user's process something; of steps only the last is kept."""
        if token not in (None, self._token):
            return
        if kind == "step" and self._events and self._events[-1][0] == "step":
            self._events.pop()
        self._add(kind, payload)

    async def keep(self, token: str, epoch: int, data: bytes, line: bytes, offset: int, workers: int) -> bool:
        """Wait until a checkpoint and its epoch's line are on the disk; False: this group of workers is to end here."""
        if token != self._token:
            return False
        self._newest = data
        answer = self._answers[token, epoch] = asyncio.get_running_loop().create_future()
        self._add("checkpoint", epoch, data, line, offset, workers)
        return await answer

    # for the user's process
    async def take(self, timeout: float) -> list[tuple[Any, ...]]:
        """All that is new; waits for something at most `timeout` seconds."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return []
        events, self._events = self._events, []
        self._arrived.clear()
        return events

    async def kept(self, epoch: int, go_on: bool) -> None:
        """The checkpoint of an epoch is on the disk."""
        for key in [key for key in self._answers if key[1] == epoch]:
            self._answers.pop(key).set_result(go_on)

    def _add(self, *event: Any) -> None:
        self._events.append(event)
        self._arrived.set()
