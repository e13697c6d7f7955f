"""A job's lines in a log file."""

import io

import pytest
from rich.console import Console

from istanas.training import Metrics
from pipeline.jobs.progress import EpochBar
from pipeline.sweeps.bookkeeping import seconds_left


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines_of(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def test_a_log_file_says_how_far_it_is_and_the_time_left(clock: Clock) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, width=80), "search", 50, clock=clock) as bar:
        for epoch in (1, 2, 3):
            clock.now += 15
            bar.epoch_line(f"epoch {epoch}: loss 1.000, 15.0 s\nmore", epoch)
        clock.now += 47 * 15
        bar.epoch_line("epoch 50: loss 1.000, 15.0 s", 50)
    lines = lines_of(out)
    assert lines[4] == "epoch 3: loss 1.000, 15.0 s (epoch 3/50, 11 min 45 s left)"
    assert lines[5] == "more"
    assert lines[-1] == "epoch 50: loss 1.000, 15.0 s (epoch 50/50)"


def test_a_resumed_run_estimates_from_its_own_epochs(clock: Clock) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, width=80), "search", 50, clock=clock) as bar:
        clock.now += 60
        bar.epoch_line("epoch 41: loss 1.000, 60.0 s", 41)
    assert lines_of(out) == ["epoch 41: loss 1.000, 60.0 s (epoch 41/50, 9 min 0 s left)"]


def test_the_start_of_workers_does_not_count_as_training(clock: Clock) -> None:
    """Ray may take longer to start than an epoch takes."""
    out = io.StringIO()
    with EpochBar(Console(file=out, width=80), "search", 3, clock=clock) as bar:
        clock.now += 600
        bar.begin(0)
        clock.now += 10
        bar.epoch_line("epoch 1: loss 1.000, 10.0 s", 1)
    assert lines_of(out) == ["epoch 1: loss 1.000, 10.0 s (epoch 1/3, 20.0 s left)"]


def test_a_long_epoch_writes_lines_of_progress(clock: Clock) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, width=200), "search", 2, clock=clock) as bar:
        for step in range(1, 11):
            clock.now += 50
            bar.step(0, step, 10, lambda: Metrics(1.5, 0.25, 4, None))
    lines = lines_of(out)
    assert lines[0] == "epoch 1/2: step 3 of 10, loss 1.500, top-1 25.0 %, about 14 min 10 s left"
    assert [line.partition(",")[0] for line in lines] == [f"epoch 1/2: step {n} of 10" for n in (3, 6, 9)]


def test_a_terminal_has_the_bar_instead_of_lines_of_progress(clock: Clock) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, width=80, force_terminal=True), "search", 2, clock=clock) as bar:
        clock.now += 500
        bar.step(0, 1, 2, lambda: None)
        bar.epoch_line("epoch 1: loss 1.000", 1)
    assert "epoch 1: loss 1.000" in out.getvalue()
    assert "(epoch 1/2" not in out.getvalue()
    assert "step 1 of 2" not in out.getvalue()


def test_a_log_file_says_how_far_a_sweep_is_and_the_time_left(clock: Clock) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, width=80), "sweep", 12, "trial", clock=clock) as bar:
        clock.now += 100
        bar.epoch_line("trial 2 done: top-1 90.0 %\nwarning: trial 2: more", 3, seconds_left=840)
        bar.epoch_line("trial 11 done: top-1 90.0 %", 12, seconds_left=0)
    assert lines_of(out) == [
        "trial 2 done: top-1 90.0 % (trial 3/12, about 14 min 0 s left)",
        "warning: trial 2: more",
        "trial 11 done: top-1 90.0 % (trial 12/12)",
    ]


@pytest.mark.parametrize(
    ("took", "left", "at_once", "seconds"),
    [([60], 11, 1, 660), ([60], 11, 2, 360), ([30, 90], 3, 4, 60), ([60], 0, 2, 0)],
)
def test_the_time_left_of_a_sweep_counts_trials_that_run_at_once(
    took: list[float], left: int, at_once: int, seconds: float
) -> None:
    assert seconds_left(took, left, at_once) == seconds
