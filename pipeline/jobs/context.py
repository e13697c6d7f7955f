"""The context of a job: configuration, name, console, Ray and the handling of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from rich.console import Console

from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.schema import Config
from pipeline.runs.directory import RunDir
from pipeline.training.epoch_record import Progress


@dataclass(frozen=True)
class JobContext:
    """The context that a caller gives to a job.

    Args:
        config: The whole configuration.
        name: Name of the run, without the kind of the job and the configuration's hash.
        console: Where lines for the user are written.
        runtime: Ray, which the job starts only if it has workers.
        fresh: Whether to delete the contents of the run directory and start over.
        parent: Run directory of the sweep or search that the run belongs to; None if there is none.
        tags: MLflow tags of the run, in addition to those of the job.
        on_epoch: Called after every epoch, and for every finished epoch when a run resumes. It may raise SystemExit to
            leave the run open; the caller then closes it.
        wait: Seconds to wait for another process that uses the run directory; -1 waits without a limit.
        run: The run directory, if the caller has acquired it already.
    """

    config: Config
    name: str
    console: Console
    runtime: Runtime
    fresh: bool = False
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    on_epoch: Callable[[Progress], None] | None = None
    wait: float = 0.0
    run: RunDir | None = None

    def say(self, text: str) -> None:
        """Write a line for the user."""
        say_to(self.console)(text)

    def with_config(self, config: Config) -> JobContext:
        """Return the context with another configuration."""
        return replace(self, config=config)


def say_pictures(lines: Iterable[str], say: Callable[[str], None]) -> None:
    """Write the notes and warnings about the pictures of a job."""
    for line in lines:
        say(line if line.startswith("warning: ") else f"pictures: {line}")


def say_to(console: Console) -> Callable[[str], None]:
    """Return a function that writes a line to a console as it is, without markup, colours or line breaks."""
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)
