"""Client of Ray's job server, which submits, lists, follows and stops jobs, and raises one-line errors.

Ray's own `JobSubmissionClient` handles jobs. This module sends the first request and finds the token itself, because of
three limitations of the client in Ray 2.60. It has no timeout, and waits forever for a server that accepts connections
but does not answer. It sends the token to any server. It finds the token only if RAY_AUTH_MODE was set before Ray was
imported, and does not check that a header can hold the token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from istanas.errors import ConfigError, IstanasError
from pipeline.base.interruption import TERMINATED
from pipeline.base.redaction import without_secrets
from pipeline.base.servers import by_proxy
from pipeline.base.text import one_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # Ray's default, and that of a forwarded port
PROGRAM = "python -m pipeline.cli"
GIVE_DASHBOARD = f"give the address of the head's dashboard, such as {DEFAULT_ADDRESS}, or start the cluster"
TOKEN_FILE = Path("~/.ray/auth_token")
TOKEN_SOURCES = f"RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or {TOKEN_FILE}"
SECONDS_TO_ANSWER = 10.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_WITHOUT_ANSWER = 60.0  # A server that does not answer for this long counts as lost.
# After this time without a line, the log is requested again: connections break unnoticed when a laptop sleeps.
SECONDS_OF_SILENCE = 120.0
SECONDS_TO_STOP = 60  # Time that a terminated job has before Ray kills it; Ray's default is 3.
# Names of jobs. The client does not quote names, so other characters would change the address of a request.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
STOPPED = "STOPPED"
ENDED = (STOPPED, "SUCCEEDED", "FAILED")
TOKEN_MISSING = "Missing authentication token"  # in the text of the dashboard's answer, with status 401
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what an HTTP header can hold; errors about others would show the token

Write = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job, as tables and `--json` show it.

    Args:
        id: The name by which the job is followed and stopped.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: None until the job has ended.
        command: The command that the job runs.
        started, ended: Seconds since the epoch.
        message: The reason why the job failed before it ran, otherwise "".
    """

    id: str
    status: str
    exit_code: int | None
    command: str
    started: float | None
    ended: float | None
    message: str

    @property
    def seconds(self) -> float | None:
        """The duration of the job up to its end or now."""
        if self.started is None:
            return None
        return (time.time() if self.ended is None else self.ended) - self.started

    def as_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {**asdict(self), "seconds": self.seconds}


class JobServer:
    """The job server of a cluster, which has answered a first request.

    Args:
        address: The address of the dashboard; see `job_address`.

    Raises:
        ConfigError: The address is not a dashboard's.
        IstanasError: The server there is not a job server, or requires a token.
    """

    def __init__(self, address: str) -> None:
        self.address = job_address(address)
        self.shown = without_secrets(self.address)
        headers = self._authentication()
        from ray.job_submission import JobSubmissionClient

        # Ray logs each step of a submission.
        for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._errors(), _hidden_addresses():
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, command: str, job_id: str, package: Path, environment: dict[str, str]) -> None:
        """Start a job.

        Args:
            command: The shell command to run in the folder of the package.
            job_id: A name that is new on this cluster.
            package: A zip file.
            environment: Variables of the job and its workers. Ray shows them to everyone who sees the job.

        Raises:
            ConfigError: The name is taken.
            IstanasError: The server rejects the job.
        """
        variables = {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_STOP)}
        with self._errors():
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": variables},
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise ConfigError(
                    f"an earlier job at {self.shown} has the name {job_id}",
                    field="--name",
                    remedy="choose another name, or leave it out",
                ) from None

    def jobs(self) -> list[Job]:
        """Return all submitted jobs that the cluster remembers, the newest first."""
        with self._errors():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def job(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            ConfigError: There is no such job.
        """
        with self._errors(job_id):
            return _job(self._client.get_job_info(job_id))

    def follow(self, job_id: str, write: Write) -> Job:
        """Write a job's log, from its beginning and as it grows, until the job has ended.

        The connection is opened again if it breaks.

        Args:
            job_id: The job.
            write: Receives pieces of text, including line ends.

        Raises:
            IstanasError: The server was lost; the job may still run.
        """
        shown, answered = 0, time.monotonic()

        async def tail() -> bool:
            """Return whether the end of the log was reached."""
            nonlocal shown, answered
            position = 0
            pieces = aiter(self._client.tail_job_logs(job_id))
            while True:
                try:
                    text = await asyncio.wait_for(anext(pieces), SECONDS_OF_SILENCE)
                except StopAsyncIteration:
                    return True
                except TimeoutError:
                    return False
                answered = time.monotonic()
                new = text[max(shown - position, 0) :]  # Every connection sends the log from its beginning.
                position += len(text)
                if new:
                    write(new)
                    shown = position

        import aiohttp

        while True:
            whole, trouble = False, None
            try:
                whole = asyncio.run(tail())
            except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
                trouble = error
            try:
                job = self.job(job_id)  # even if its log cannot be read
                answered = time.monotonic()
            except ConfigError:
                raise
            except IstanasError as error:
                if time.monotonic() - answered > SECONDS_WITHOUT_ANSWER:
                    raise IstanasError(
                        f"{self.shown} no longer answers ({one_line(trouble or error)}); the job may still run",
                        remedy=f"attach again later: istanas jobs {job_id} --follow --address {self.shown}",
                    ) from None
            else:
                if job.status in ENDED:
                    if not whole:
                        write(self._rest_of_log(job_id, shown))
                    return job
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _rest_of_log(self, job_id: str, start: int) -> str:
        """Return an ended job's log from a position on, or why it cannot be read."""
        try:
            with self._errors(job_id):
                return str(self._client.get_job_logs(job_id))[start:]
        except IstanasError as error:
            return f"\nthe rest of the log cannot be read: {error}\n"

    def stop(self, job_id: str) -> tuple[Job, bool]:
        """Stop a job, and wait until it has ended.

        Returns:
            The job, and whether it was stopped; False if it had ended by itself.

        Raises:
            IstanasError: The job does not end.
        """
        job = self.job(job_id)
        if job.status in ENDED:
            return job, False
        with self._errors(job_id):
            self._client.stop_job(job_id)
        end = time.monotonic() + SECONDS_TO_STOP + 30
        while (job := self.job(job_id)).status not in ENDED:
            if time.monotonic() > end:
                raise IstanasError(
                    f"job {job_id} was stopped, but is still {job.status}",
                    remedy=f"see its page at {self.shown}",
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return job, job.status == STOPPED

    def _authentication(self) -> dict[str, str]:
        """Return the headers of requests, after the server has answered as Ray's job server does.

        The token is sent only to a server that requests it with Ray's message, never to any mistyped address.
        """
        answer = self._request_version({})
        headers: dict[str, str] = {}
        source = ""
        if answer.status_code == 401 and TOKEN_MISSING in answer.text:
            token, source = _find_token()
            if token is not None:
                headers = {"Authorization": f"Bearer {token}"}
                answer = self._request_version(headers)
        if answer.status_code == 401 and TOKEN_MISSING in answer.text:
            problem = f"the cluster at {self.shown} requires its token"
            if _tokens_are_off():
                problem = f"{os.environ['RAY_AUTH_MODE']!r}, but {problem}"
                raise IstanasError(problem, field="RAY_AUTH_MODE", remedy="set it to token, or unset it")
            raise IstanasError(problem, field="--address", remedy=f"give the token by {TOKEN_SOURCES}")
        if answer.status_code == 403 and headers:
            problem = f"the cluster at {self.shown} rejects this token"
            raise IstanasError(problem, field=source, remedy=f"give the cluster's own by {TOKEN_SOURCES}")
        try:
            known = answer.status_code == 200 and "ray_version" in answer.json()
        except (TypeError, ValueError):
            known = False
        if not known:
            raise self._no_job_server(f"HTTP {answer.status_code}")
        return headers

    def _request_version(self, headers: dict[str, str]) -> Any:
        import requests

        url = f"{self.address}/api/version"
        try:  # Another server must not receive the token by a redirect.
            return requests.get(url, headers=headers, timeout=SECONDS_TO_ANSWER, allow_redirects=False)
        except requests.RequestException as error:
            reason = one_line(error)
            if "BadStatusLine" in reason or isinstance(error, requests.exceptions.SSLError):
                reason = f"the process that listens there does not speak {urlsplit(url).scheme.upper()}"
            raise self._no_job_server(reason) from None

    def _no_job_server(self, reason: str) -> IstanasError:
        problem = f"no Ray job server answers at {self.shown} ({reason}{by_proxy(self.address)})"
        return IstanasError(problem, field="--address", remedy=GIVE_DASHBOARD)

    @contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """Convert the client's errors to those of this project. An invalid job name is rejected without a request."""
        import requests

        unknown = ConfigError(
            f"no job {job_id!r:.80} at {self.shown}",
            field="ID",
            remedy=f"list the jobs: istanas jobs --address {self.shown}",
        )
        if job_id is not None and ID.fullmatch(job_id) is None:
            raise unknown
        try:
            yield
        except (AttributeError, TypeError, ValueError) as error:  # from parsing the answer
            raise IstanasError(
                f"{self.shown} does not answer as Ray's job server does ({one_line(error)})",
                remedy=GIVE_DASHBOARD,
            ) from None
        except (requests.RequestException, ConnectionError) as error:
            raise IstanasError(f"{self.shown} no longer answers ({one_line(error)})") from None
        except (
            RuntimeError
        ) as error:  # The client raises it, with the answer's text, for every status but 200.
            if job_id is not None and "status code 404" in str(error):
                raise unknown from None
            raise IstanasError(f"{self.shown}: {one_line(error, 500)}") from None


def job_address(text: str) -> str:
    """Return the address of a dashboard, with its scheme.

    Raises:
        ConfigError: The text is not such an address.

    Example:
        >>> job_address("head:8265"), job_address("https://head/ray/")
        ('http://head:8265', 'https://head/ray')
    """
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or text in ("auto", "local"):
        raise ConfigError(
            f"{without_secrets(text)!r:.80} is not the address of a dashboard, which contains the job server",
            field="--address",
            remedy="give http://HOST:8265",
        )
    return url


def is_loopback(address: str) -> bool:
    """Return whether an address refers to the machine that uses it.

    Example:
        >>> is_loopback("http://127.0.0.1:8265"), is_loopback("http://localhost"), is_loopback("http://head:8265")
        (True, True, False)
    """
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:  # an incomplete IPv6 address
        return False
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def exit_code(status: str, driver_exit_code: int | None) -> int | None:
    """Return a job's exit code as a shell reports it: None before the job's end, 143 if it was stopped.

    Example:
        >>> exit_code("FAILED", 2), exit_code("FAILED", -9), exit_code("STOPPED", None), exit_code("RUNNING", None)
        (2, 137, 143, None)
    """
    if status not in ENDED:
        return None
    if status == STOPPED:
        return TERMINATED
    if driver_exit_code is None:  # The job failed before it ran.
        return int(status == "FAILED")
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _job(details: Any) -> Job:
    """Return the job that Ray describes, without its environment."""
    status = details.status.value
    never_ran = status == "FAILED" and details.driver_exit_code is None
    command = details.entrypoint
    start = command.find(PROGRAM)
    if start >= 0:
        command = f"istanas{command[start + len(PROGRAM) :]}"
    return Job(
        id=details.submission_id,
        status=status,
        exit_code=exit_code(status, details.driver_exit_code),
        command=without_secrets(command),
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if not details.end_time else details.end_time / 1000,
        message=without_secrets(" ".join((details.message or "").split())) if never_ran else "",
    )


@contextmanager
def _hidden_addresses() -> Iterator[None]:
    """Hide address variables of the environment, which Ray's client prefers to its argument."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _tokens_are_off() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"


def _find_token() -> tuple[str | None, str]:
    """Return the cluster's token and its source, searched in Ray's order, even without RAY_AUTH_MODE.

    Raises:
        ConfigError: A file cannot be read, or does not contain a token.
    """
    if _tokens_are_off():
        return None, ""
    token, source = os.environ.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        file = Path(named or TOKEN_FILE).expanduser()
        source = f"RAY_AUTH_TOKEN_PATH ({file})" if named else str(TOKEN_FILE)
        try:
            token = file.read_bytes().decode("ascii", errors="replace").strip()
        except OSError as error:
            if not named and not file.exists():
                return None, ""
            raise ConfigError(
                f"cannot be read ({error.strerror})", field=source, remedy="name the file with the token"
            ) from None
        if not token and not named:
            return None, ""
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(
            "not a token, which is one line of ASCII", field=source, remedy=f"set {TOKEN_SOURCES}"
        )
    return token, source
