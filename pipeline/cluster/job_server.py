"""Ray's job server at an address: submit, list, follow and stop jobs, with one readable line for what goes wrong."""

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

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # Ray's own, and that of a forwarded port
PROGRAM = "python -m pipeline.cli"
GIVE = f"give the address of the head's dashboard, such as {DEFAULT_ADDRESS}, or start the cluster"
TOKEN_FILE = Path("~/.ray/auth_token")
SECONDS_TO_ANSWER = 10.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_WITHOUT_ANSWER = 60.0  # after which a server that was there counts as gone
# After which a log is asked for anew: connections die unnoticed where laptops sleep.
SECONDS_OF_SILENCE = 120.0
SECONDS_TO_STOP = 60  # for a job that is told to end, before Ray kills it; Ray's own default is 3
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a job; more would mean something in an address
STOPPED = "STOPPED"
ASKS_FOR_TOKEN = "Missing authentication token"  # so says Ray's dashboard, with code 401
_TOKEN = re.compile(r"[\x21-\x7e]+")
ENDED = (STOPPED, "SUCCEEDED", "FAILED")

Write = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job as people and programs see it.

    Args:
        id: by which it is followed and stopped.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: None until it has ended.
        command: what it runs.
        started, ended: seconds since the epoch.
        message: why it failed without having run, else "".
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
        """How long it has been running, or ran."""
        if self.started is None:
            return None
        return (time.time() if self.ended is None else self.ended) - self.started

    def as_json(self) -> dict[str, Any]:
        """The figures for programs."""
        return {**asdict(self), "seconds": self.seconds}


class JobServer:
    """The job server of a cluster, which has answered.

    Args:
        address: of the dashboard; see `job_address`.

    Raises:
        ConfigError: the address has no such form.
        IstanasError: who listens there is no job server, or wants a token.
    """

    def __init__(self, address: str) -> None:
        self.address = job_address(address)
        self.shown = without_secrets(self.address)
        headers = self._greet()
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)  # it tells each of its steps
        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._errors(), _addresses_hidden():
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, command: str, job_id: str, parcel: Path, environment: dict[str, str]) -> None:
        """Start a job.

        Args:
            command: for the shell, in the parcel's folder.
            job_id: new on this cluster.
            parcel: a zip.
            environment: variables, of the job and of its workers; Ray shows them to all who see the job.

        Raises:
            IstanasError: the server refuses it.
        """
        variables = {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_STOP)}
        with self._errors():
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(parcel), "env_vars": variables},
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise ConfigError(
                    f"--name {job_id}: {self.shown} has had a job of this name, choose another or leave it out"
                ) from None

    def jobs(self) -> list[Job]:
        """All submitted jobs that the cluster remembers, the newest first."""
        with self._errors():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            ConfigError: there is none of this id.
        """
        with self._errors(job_id):
            return _job(self._client.get_job_info(job_id))

    def follow(self, job_id: str, write: Write) -> Job:
        """Write a job's log from its beginning, as it grows, until the job has ended.

        Args:
            job_id: which.
            write: takes pieces of text, line ends included.

        Raises:
            IstanasError: the server has gone; the job may go on.
        """
        shown, answered = 0, time.monotonic()

        async def tail() -> bool:
            """Whether the log's end was seen."""
            nonlocal shown, answered
            position = 0
            pieces = aiter(self._client.tail_job_logs(job_id))
            while True:
                try:
                    text = await asyncio.wait_for(anext(pieces), SECONDS_OF_SILENCE)
                except StopAsyncIteration:
                    return True
                except TimeoutError:  # the next connection
                    return False
                answered = time.monotonic()
                new = text[max(shown - position, 0) :]  # a connection that was lost begins anew
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
                job = self.job(job_id)  # whatever became of its log
                answered = time.monotonic()
            except ConfigError:
                raise
            except IstanasError as error:
                if time.monotonic() - answered > SECONDS_WITHOUT_ANSWER:
                    raise IstanasError(
                        f"{self.shown} does not answer any more ({one_line(trouble or error)}); the job may go on, "
                        f"attach again when it does: istanas jobs {job_id} --follow --address {self.shown}"
                    ) from None
            else:
                if job.status in ENDED:
                    if not whole:
                        write(self._rest(job_id, shown))
                    return job
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _rest(self, job_id: str, shown: int) -> str:
        """An ended job's log from a position on, or why it can't be had."""
        try:
            with self._errors(job_id):
                return str(self._client.get_job_logs(job_id))[shown:]
        except IstanasError as error:
            return f"\nthe rest of the log can't be read: {error}\n"

    def stop(self, job_id: str) -> tuple[Job, bool]:
        """Tell a job to end, and wait until it has.

        Returns:
            The job, and whether it was stopped: not, if it had ended by itself.

        Raises:
            IstanasError: it does not end.
        """
        if self.job(job_id).status in ENDED:
            return self.job(job_id), False
        with self._errors(job_id):
            self._client.stop_job(job_id)
        end = time.monotonic() + SECONDS_TO_STOP + 30
        while (job := self.job(job_id)).status not in ENDED:
            if time.monotonic() > end:
                raise IstanasError(
                    f"job {job_id}: was told to end and is {job.status} still, see {self.shown}"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return job, job.status == STOPPED

    def _greet(self) -> dict[str, str]:
        """See whether a job server answers, and how it wants to be spoken to; Ray's client would wait for ever.

        The token is for who asks for it in Ray's words: a mistyped address does not get to know it.
        """
        answer = self._version({})
        headers: dict[str, str] = {}
        source = ""
        if answer.status_code == 401 and ASKS_FOR_TOKEN in answer.text:
            token, source = _token()
            if token is not None:
                headers = {"Authorization": f"Bearer {token}"}
                answer = self._version(headers)
        if answer.status_code == 401 and ASKS_FOR_TOKEN in answer.text:
            if _tokens_are_off():
                raise IstanasError(
                    f"--address {self.shown}: the cluster wants its token, and RAY_AUTH_MODE is "
                    f"{os.environ['RAY_AUTH_MODE']}: set it to token, or leave it out"
                )
            raise IstanasError(
                f"--address {self.shown}: the cluster wants its token, set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or "
                f"write it to {TOKEN_FILE}"
            )
        if answer.status_code == 403 and headers:
            raise IstanasError(
                f"--address {self.shown}: the cluster refuses the token of {source}, give its own by RAY_AUTH_TOKEN, "
                f"RAY_AUTH_TOKEN_PATH or {TOKEN_FILE}"
            )
        try:
            known = answer.status_code == 200 and "ray_version" in answer.json()
        except (TypeError, ValueError):
            known = False
        if not known:
            raise IstanasError(
                f"--address {self.shown}: who answers there is no Ray job server (HTTP {answer.status_code}"
                f"{by_proxy(self.address)}), {GIVE}"
            )
        return headers

    def _version(self, headers: dict[str, str]) -> Any:
        import requests

        try:
            return requests.get(
                f"{self.address}/api/version",
                headers=headers,
                timeout=SECONDS_TO_ANSWER,
                allow_redirects=False,  # to nobody else, and not with the token
            )
        except requests.RequestException as error:
            reason = one_line(error)
            if "BadStatusLine" in reason or isinstance(error, requests.exceptions.SSLError):
                reason = f"who listens there does not speak {urlsplit(self.address).scheme.upper()}"
            raise IstanasError(
                f"--address {self.shown}: no Ray job server answers there ({reason}{by_proxy(self.address)}), {GIVE}"
            ) from None

    @contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """Ray's errors as ours; a name that no job has is not asked for."""
        import requests

        if job_id is not None and ID.fullmatch(job_id) is None:
            raise ConfigError(
                f"job {job_id!r:.80}: no job has such a name, istanas jobs --address {self.shown} lists those that "
                "there are"
            )
        try:
            yield
        except (AttributeError, TypeError, ValueError) as error:  # Ray's client takes apart whatever comes
            raise IstanasError(
                f"{self.shown}: an answer that is not of Ray's job server ({one_line(error)}), {GIVE}"
            ) from None
        except (requests.RequestException, ConnectionError) as error:
            raise IstanasError(f"{self.shown} does not answer any more ({one_line(error)})") from None
        except RuntimeError as error:  # for every answer that is not well, with its text
            if job_id is not None and "status code 404" in str(error):
                raise ConfigError(
                    f"job {job_id!r:.80}: unknown at {self.shown}, istanas jobs lists those that there are"
                ) from None
            raise IstanasError(f"{self.shown}: {one_line(error, 500)}") from None


def job_address(text: str) -> str:
    """The address of a dashboard, with its scheme.

    Raises:
        ConfigError: it is none.

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
            f"--address {without_secrets(text)!r:.80}: jobs are submitted to the head's dashboard, give "
            "http://HOST:8265"
        )
    return url


def is_loopback(address: str) -> bool:
    """Whether an address means the machine that reads it.

    Example:
        >>> is_loopback("http://127.0.0.1:8265"), is_loopback("http://localhost"), is_loopback("http://head:8265")
        (True, True, False)
    """
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:  # half an IPv6 address
        return False
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def exit_code(status: str, driver_exit_code: int | None) -> int | None:
    """The exit code of a job, as a shell would have it: None before its end, 143 if it was stopped.

    Example:
        >>> exit_code("FAILED", 2), exit_code("FAILED", -9), exit_code("STOPPED", None), exit_code("RUNNING", None)
        (2, 137, 143, None)
    """
    if status not in ENDED:
        return None
    if status == STOPPED:
        return TERMINATED
    if driver_exit_code is None:  # it never ran
        return int(status == "FAILED")
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _job(details: Any) -> Job:
    """What Ray says of a job; its environment stays out."""
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
def _addresses_hidden() -> Iterator[None]:
    """Inside, no address of the environment: Ray's client would prefer it to the one that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _tokens_are_off() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"


def _token() -> tuple[str | None, str]:
    """The cluster's token, and where it was found: where Ray looks, in Ray's order, but without RAY_AUTH_MODE too.

    Raises:
        ConfigError: a file can't be read, or what is there is no token.
    """
    if _tokens_are_off():
        return None, ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked_token(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named).expanduser() if named else TOKEN_FILE.expanduser()
    source = f"RAY_AUTH_TOKEN_PATH ({file})" if named else str(TOKEN_FILE)
    try:
        token = file.read_bytes().decode("ascii", errors="replace").strip()
    except OSError as error:
        if not named and not file.exists():
            return None, ""
        raise ConfigError(
            f"{source}: can't be read ({error.strerror}), name the file with the token"
        ) from None
    return _checked_token(token, source) if token or named else (None, "")


def _checked_token(token: str, source: str) -> tuple[str, str]:
    """A token that an HTTP header can hold; errors about other headers would show it."""
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(f"{source}: holds no token (one line of ASCII)")
    return token, source
