"""A command whose output is read line by line, and the signals that a process catches or has pending."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.ray_cluster import PROGRAM


class Followed:
    """A running `istanas` command, with stdout and stderr in one stream.

    Args:
        arguments: The command's arguments.
        environment: The command's whole environment.
        cwd: The folder in which it runs; None: the current one.
        own_group: Whether it has its own process group, as a shell creates one, for Ctrl-C.
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
        """Read up to the next line that begins with the pattern, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.match(pattern, line):
                return line
        raise AssertionError(f"no line like {pattern!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        """Read the remaining lines and return the exit code."""
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait(120)


def has_signal(pid: int, mask: str, number: int) -> bool:
    """Return whether a mask of `/proc/PID/status` has a signal: SigCgt (caught) or ShdPnd (pending)."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return bool(
        int(next(line.split()[1] for line in status if line.startswith(mask)), 16) >> (number - 1) & 1
    )
