"""A command at somebody's terminal, followed line by line; and what the kernel knows of a process's signals."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.ray_cluster import PROGRAM


class Followed:
    """One start of our command line, stdout and stderr together.

    Args:
        arguments: of the command.
        environment: all of it.
        cwd: where it runs; None: here.
        own_group: in a process group of its own, as a shell makes it, for Ctrl-C.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        own_group: bool = False,
    ) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=own_group,
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> str:
        """Read on up to the first line that begins with the pattern."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.match(pattern, line):
                return line
        raise AssertionError(f"no line like {pattern!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        """Read the rest, and wait for the exit code."""
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait(120)


def has_signal(pid: int, mask: str, number: int) -> bool:
    """Whether a signal is in one of the masks of `/proc/PID/status`: SigCgt (caught), ShdPnd (pending)."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return bool(
        int(next(line.split()[1] for line in status if line.startswith(mask)), 16) >> (number - 1) & 1
    )
