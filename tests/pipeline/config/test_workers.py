"""Numbers of workers and threads: parsing, and what fits on the nodes of a cluster."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from istanas.errors import ConfigError
from pipeline.base.text import count
from pipeline.config.threads import threads_in_process, threads_per_worker, usable_cores
from pipeline.config.workers import Node, WorkerRange, largest, parse_workers, workers_that_fit

NODES = st.lists(st.builds(Node, st.integers(0, 12), st.integers(0, 4)), max_size=4)


# ---------- parsing
@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_a_number_and_a_range_are_read_and_print_as_they_were_written(low: int, high: int) -> None:
    for written in (low, str(low), f"{low}:{low}"):
        fixed = parse_workers(written)
        assert fixed == WorkerRange(low, low)
        assert (fixed.elastic, str(fixed)) == (False, str(low))
    if 1 <= low < high:
        elastic = parse_workers(f"{low}:{high}")
        assert elastic == WorkerRange(low, high)
        assert (elastic.elastic, str(elastic)) == (True, f"{low}:{high}")
        assert parse_workers(str(elastic)) == elastic
    elif low != high:
        with pytest.raises(ConfigError):
            parse_workers(f"{low}:{high}")


@pytest.mark.parametrize(
    "written",
    ["", "abc", "-1", "1.5", "1:", ":4", "4:1", "0:4", "1:2:3", "1-4", " 2", "2\n", "1e3", "9" * 7, -1, True],
)
def test_anything_else_is_refused_in_one_short_line(written: int | str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^workers: .* is not a number of workers; give a number or MIN:MAX, such as 2 or 1:4$",
    ) as caught:
        parse_workers(written)
    assert repr(written) in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_workers("x\n" * 1000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 130


# ---------- fitting
@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 120))
def test_the_largest_that_fits_is_found_with_few_questions(low: int, more: int, limit: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= limit

    assert largest(low, low + more, fits) == max(low, min(low + more, limit))
    assert len(asked) <= 1 + more.bit_length()
    assert low not in asked, "it is taken for granted"


def packed(nodes: list[Node], threads: int, gpu: bool) -> int:
    """Count the workers by placing them on the nodes one by one."""
    free = [[node.cpus, node.gpus] for node in nodes]
    placed = 0
    for node in free:
        while node[0] >= threads and (not gpu or node[1] >= 1):
            node[0] -= threads
            node[1] -= gpu
            placed += 1
    return placed


@given(NODES, st.integers(1, 6), st.booleans())
def test_as_many_workers_fit_as_can_be_placed_one_by_one(nodes: list[Node], threads: int, gpu: bool) -> None:
    assert workers_that_fit(nodes, threads, gpu) == packed(nodes, threads, gpu)


@given(NODES, st.integers(1, 8), st.booleans())
def test_the_most_threads_that_cost_no_worker_its_place(nodes: list[Node], workers: int, gpu: bool) -> None:
    threads = threads_per_worker(nodes, workers, gpu)
    placed_with = {t: min(workers, workers_that_fit(nodes, t, gpu)) for t in range(1, 14)}
    assert threads >= 1
    if placed_with[1] > 0:
        assert placed_with[threads] == placed_with[1]
        assert all(placed < placed_with[1] for t, placed in placed_with.items() if t > threads)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "threads"),
    [
        ([Node(8)], 1, False, 8),
        ([Node(8)], 2, False, 4),
        ([Node(8)], 3, False, 2),
        ([Node(2)], 4, False, 1),  # more workers than cores
        ([Node(3), Node(3)], 2, False, 3),
        ([Node(3), Node(3)], 3, False, 1),
        ([Node(16, 2)], 2, True, 8),
        ([Node(16, 2), Node(64)], 2, True, 8),  # a node without GPUs has no workers
        ([Node(4, 1)], 8, True, 4),  # there is a GPU for one worker only
        ([], 2, False, 1),
    ],
)
def test_threads_of_some_clusters(nodes: list[Node], workers: int, gpu: bool, threads: int) -> None:
    assert threads_per_worker(nodes, workers, gpu) == threads


# ---------- this machine
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cores_that_were_not_granted_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    granted = os.sched_getaffinity(0)
    assert usable_cores() == threads_in_process(None) == len(granted)
    try:
        os.sched_setaffinity(0, {min(granted)})
        assert usable_cores() == threads_in_process(None) == 1
        assert threads_in_process(7) == 7
    finally:
        os.sched_setaffinity(0, granted)


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        ("1", 1),
        (" +1 ", 1),
        ("1,4", 1),
        ("100000", usable_cores()),
        *((value, usable_cores()) for value in ("", "0", "-1", "1.5", "many")),
    ],
)
def test_omp_num_threads_limits_a_job_in_one_process(
    monkeypatch: pytest.MonkeyPatch, value: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads_in_process(None) == threads
    assert threads_in_process(5) == 5, "the setting takes precedence"


def test_a_number_and_its_noun_agree() -> None:
    assert [count(n, "core") for n in (0, 1, 2)] == ["0 cores", "1 core", "2 cores"]
