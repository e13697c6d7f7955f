"""Wait in a test until a condition holds, with a message that says what was missing."""

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


def poll(condition: Callable[[], T], seconds: float, *, interval: float = 0.05) -> T:
    """Call a condition until its value is true or the time is up, and return its last value.

    For conditions that may stay false; a test that needs the condition calls `wait_until`.
    """
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= end  # the last call comes after the end, however slow the machine is
        value = condition()
        if value or late:
            return value
        time.sleep(interval)


def wait_until(
    condition: Callable[[], T],
    seconds: float,
    what: str,
    *,
    alive: Callable[[], bool] | None = None,
    state: Callable[[], object] | None = None,
    interval: float = 0.05,
) -> T:
    """Wait until a condition is true, and return its value.

    Args:
        condition: Called until its value is true.
        seconds: The longest time to wait.
        what: What is waited for, as it completes "waiting for ...".
        alive: Whether the condition can still become true, such as: the process runs. If not, the wait fails at once.
        state: Describes the present state in the failure's message, such as a log's text.
        interval: Seconds between two calls.

    Raises:
        AssertionError: The time was up, or `alive` returned false.
    """

    def fail(reason: str) -> NoReturn:
        raise AssertionError(f"{reason} waiting for {what}" + ("" if state is None else f":\n{state()}"))

    def met() -> T:
        value = condition()
        if not value and alive is not None and not alive():
            fail("the process ended while")
        return value

    return poll(met, seconds, interval=interval) or fail(f"timed out after {seconds:g} s,")
