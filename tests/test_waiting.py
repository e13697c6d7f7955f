"""The helper that waits for a condition in tests."""

import itertools

import pytest

from tests.waiting import poll, wait_until


def test_wait_until_returns_the_first_true_value() -> None:
    numbers = itertools.count(-2)
    assert wait_until(lambda: max(next(numbers), 0), 10, "a positive number", interval=0) == 1


def test_wait_until_names_what_is_missing_and_the_present_state() -> None:
    with pytest.raises(AssertionError, match=r"^timed out after 0 s, waiting for the log:\n3 lines$"):
        wait_until(lambda: "", 0, "the log", state=lambda: "3 lines")


def test_wait_until_fails_at_once_when_the_process_has_ended() -> None:
    with pytest.raises(AssertionError, match=r"^the process ended while waiting for its port$"):
        wait_until(lambda: None, 1000, "its port", alive=lambda: False)
    assert wait_until(lambda: "open", 1000, "its port", alive=lambda: False) == "open"


def test_poll_returns_the_last_value_and_always_asks_once() -> None:
    assert poll(lambda: 0, 0.01, interval=0) == 0
    assert poll(lambda: 5, 0) == 5
