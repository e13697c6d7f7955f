"""A Ray runtime for the length of a command: started on this machine, or a cluster that is joined by its address.

What Ray has to say goes into log files; people hear only what it waits for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil

from istanas.errors import IstanasError
from istanas.training import Compute
from pipeline.interruption import children_deaf_to_hangups, uninterrupted, working_to_an_end
from pipeline.leftovers import free_leftovers
from pipeline.resources import (
    Node,
    WorkerRange,
    count,
    largest,
    threads_per_worker,
    usable_cores,
    workers_that_fit,
)
from pipeline.schema import RuntimeSettings
from pipeline.sockets import OF_RAY, short_temporary_folder
from pipeline.worker import choose_compute

LOG_FOLDER = "ray"  # in the run directory
SECONDS_BEFORE_SAYING = 3.0
SECONDS_BETWEEN_LOOKS = 1  # for a free place; whole ones, Ray cuts off the rest and would not wait at all
SECONDS_TO_GIVE_BACK = 5  # that places of workers which have ended may take to be free
SECONDS_TO_ANSWER = 20.0  # for a Ray at an address
# After 30 without its cluster, Ray's client forgets that it is one, and looks for a Ray that this machine is a node of.
SECONDS_OF_A_CLIENT = 20.0
NOT_CONNECTED = "Ray Client is not connected"  # what it then raises, as a mere Exception
GOES_ON = "the same command goes on, on another cluster, too"
SECONDS_TO_FINISH = 60.0  # what must not be interrupted
SECONDS_TO_UNWIND = 5.0  # for a thread that was interrupted; calls into a lost cluster can't be
NOT_RAY = "who listens there does not answer as Ray does (or wants a token), give HOST:PORT of the head node"
NO_COLLECTORS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_TOKEN_FILE = Path("~/.ray/auth_token")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Allotment:
    """What a job's workers get.

    Args:
        workers: how many.
        threads: of each worker, and the cores that Ray sets aside for it.
        compute: device, backend and precision, chosen for all.
    """

    workers: WorkerRange
    threads: int
    compute: Compute

    @property
    def gpu(self) -> bool:
        """Whether each worker has a GPU."""
        return self.compute.device.type == "cuda"

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one worker, by Ray's names."""
        return {"CPU": self.threads, **({"GPU": 1} if self.gpu else {})}


class Runtime:
    """Ray, from its first use in a command to the end of the `with` block.

    Args:
        settings: address, device and number of workers.

    A process that has Ray running already (a notebook, a trial of a sweep) keeps it.
    """

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._address = find_address(settings.address)
        self._logs: Path | None = None
        self._scratch: Path | None = None
        self._ours = False
        self.lost = False  # the cluster of a mere client: calls into it would never return
        self.examined: set[str] = set()  # nodes that have passed the pre-flight
        self._tmpdir = os.environ.get("RAY_TMPDIR")  # the user's; a Ray that is started here gets its own

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours and not self.lost:
            import ray

            ray.shutdown()  # also ends what still runs for this process on a cluster
        self._ours = False
        if self._logs is not None and _session_of(self._logs) == self._scratch:
            _collect_logs(self._logs)  # a second command may have begun here meanwhile: its logs are its own
        if self._scratch is not None:
            if self._tmpdir is None:
                os.environ.pop("RAY_TMPDIR", None)
            else:
                os.environ["RAY_TMPDIR"] = self._tmpdir
            # What was refused has no run directory to collect logs in.
            shutil.rmtree(self._scratch, ignore_errors=True)

    def start(self, run_dir: Path, *, dashboard: bool = False, say: Say | None = None) -> None:
        """Start or join Ray, unless that has been done.

        Args:
            run_dir: of the job; Ray's logs go there.
            say: told where the workers run if only RAY_ADDRESS in the environment says so.
            dashboard: with its server, on 127.0.0.1: Ray Train asks it who lives, to give back the places of
                workers whose job was stopped from outside. It takes some seconds, and memory.

        Raises:
            IstanasError: if the address does not answer, or this machine is too small for the workers.
        """
        if self._ours:  # for another run of this command
            self._give_back(run_dir / LOG_FOLDER)
            return
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            return
        if say is not None and self.address_from_environment is not None:
            say(
                f"RAY_ADDRESS is {self.address_from_environment}: the workers run there; unset it to start Ray here"
            )
        if self._address is None:
            check_machine(self._settings)
        else:
            check_address(self._address)
        if self._address is None or _is_loopback_only(self._address):
            # On Linux this makes every port of a Ray that is started here listen on 127.0.0.1 only, and one that
            # does be found there; else Ray takes 127.0.0.1 for the machine's outer address.
            os.environ.update({**LOOPBACK_ONLY, **os.environ})
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon an end is noticed
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        answers = ask_ray(self._address)  # meanwhile, Ray is imported here
        import ray
        from ray._private import ray_constants

        # Read once, at Ray's import: which, for a sweep, lies behind us.
        ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) != "0"

        if not answers():
            raise IstanasError(f"{named(self._address)} {self._address}: {NOT_RAY}")
        self._logs = run_dir / LOG_FOLDER
        _collect_logs(self._logs)  # of a run that was killed
        _log_to(self._logs / "driver.log")
        options: dict[str, Any] = {"log_to_driver": False}
        if self._address is None:
            # Not in the run directory: Unix sockets lie in it, which do not work on every shared disk.
            short = short_temporary_folder(OF_RAY)
            self._scratch = Path(tempfile.mkdtemp(prefix="istanas-", dir=short))
            (self._logs / "session").symlink_to(self._scratch)  # first, so that a kill leaves nothing unknown
            # Where its processes look for their cluster, see below.
            os.environ["RAY_TMPDIR"] = str(self._scratch)
            # This machine is not taken away, and nobody looks at Ray's own figures: their collectors would only take
            # time from the workers, which wait for each other in every step.
            os.environ.update({**NO_COLLECTORS, **os.environ})
            cores = max(usable_cores(), self._settings.worker_range.minimum)
            options |= {"address": "local", "include_dashboard": dashboard, "_temp_dir": str(self._scratch)}
            options |= {"num_cpus": cores}
        else:
            options |= {"address": self._address}
        _send_errors_to_log()
        try:
            with uninterrupted(), children_deaf_to_hangups():
                ray.init(**options)
                self._ours = True
                if self._scratch is not None:
                    # Else they take any Ray of this machine for theirs, or none if there are several.
                    current = self._scratch / "ray" / "ray_current_cluster"
                    current.parent.mkdir(exist_ok=True)
                    current.write_text(ray.get_runtime_context().gcs_address)
        except Exception as error:  # of any class, a mere Exception where a node takes too long to start
            raise IstanasError(
                f"{named(self._address)} {self._address}: Ray does not answer there ({last_line(error)}), start it or "
                "correct the address"
                if self._address
                else f"Ray could not be started ({last_line(error)}), see {self._logs}"
            ) from error
        self._give_back(self._logs)
        token = _TOKEN_FILE.expanduser()
        if token.is_file() and token.stat().st_uid == os.getuid() and os.access(token, os.W_OK):
            token.chmod(0o600)  # Ray leaves it readable for everybody

    @property
    def address_from_environment(self) -> str | None:
        """The cluster's address if nothing but the user's RAY_ADDRESS says that a job goes there."""
        given = self._settings.address not in (None, "auto")
        return self._address if not given and from_environment(self._address) else None

    @property
    def joined(self) -> bool:
        """Whether this command has joined a cluster, rather than started Ray here or found it running."""
        return self._ours and self._address is not None

    def nodes(self, run_dir: Path, say: Say) -> list[Node]:
        """What there is: of the cluster, which is joined for it, or, without an address, of this machine.

        Args:
            run_dir: Ray's logs go there.
            say: as `start` takes it.

        Raises:
            IstanasError: if the address does not answer.
        """
        if self._address is None:
            return [this_machine()]
        self.start(run_dir, say=say)
        return cluster_nodes()

    def allot(self) -> Allotment:
        """Divide what the cluster has now among the workers.

        Raises:
            ConfigError: if the settings ask for a device that there is none of.
        """
        return allotment(self._settings, cluster_nodes(), may_come=self.joined)

    def wait(self, allotment: Allotment, say: Say) -> None:
        """Wait until the cluster has room for the (least number of) workers.

        The demand is put to Ray as a placement group, so that a cluster that can grow does.

        Args:
            allotment: what the workers need.
            say: told once what is waited for.

        Raises:
            IstanasError: after `runtime.wait_minutes`.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        number = allotment.workers.minimum
        group = placement_group([allotment.bundle] * number)
        start, told = time.monotonic(), False
        try:
            while not group.wait(SECONDS_BETWEEN_LOOKS):
                seconds = time.monotonic() - start
                needs = f"{_bundles(number, allotment)}; free now: {_resources(ray.available_resources())}"
                if not told and seconds > min(SECONDS_BEFORE_SAYING, 30 * self._settings.wait_minutes):
                    if self._logs is not None and self._give_back(self._logs):
                        continue
                    told = True
                    say(f"waiting for {needs}; at most {self._settings.wait_minutes:g} minutes")
                if seconds > 60 * self._settings.wait_minutes:
                    raise IstanasError(
                        f"gave up after {self._settings.wait_minutes:g} minutes (runtime.wait_minutes) of waiting for "
                        f"{needs}: add nodes, wait for other jobs, or lower --workers; the same command goes on"
                    )
        finally:
            if not self.lost:
                remove_placement_group(group)

    @contextlib.contextmanager
    def noticing_a_clients_loss(self, job: str, run_dir: Path) -> Iterator[None]:
        """Inside, a mere client (ray://) is told that its cluster is gone, for which Ray's client would wait for ever.

        Args:
            job: for the message.
            run_dir: likewise.

        Raises:
            IstanasError: the cluster was lost.
        """
        if not self._ours or self._address is None or not self._address.startswith("ray://"):
            yield
            return
        logs, head = run_dir / LOG_FOLDER, self._address.removeprefix("ray://")

        def note() -> None:
            self.lost = True
            warnings.filterwarnings("ignore", message="Ray Client connection timed out")  # it has been said

        try:
            with noticing_its_loss(job, logs, head, SECONDS_OF_A_CLIENT, note):
                yield
        except Exception as error:
            # Else what serves this client on the head has died, or a call broke before the watcher noticed.
            if not self.lost and not _is_of_rays_client(error):
                raise
            self.lost = True
            _forget_client()
            if isinstance(error, IstanasError):
                raise
            raise IstanasError(f"{job}: Ray was lost ({last_line(error)}), see {logs}; {GOES_ON}") from error

    def _give_back(self, logs: Path) -> bool:
        """Whether a killed sitting of the run still held places on this cluster, which are free now."""
        # A Ray that is started here has no past, and a mere client of one no say.
        if not self._ours or self._address is None or self._address.startswith("ray://"):
            return False
        return free_leftovers(logs) > 0

    def room(self, allotment: Allotment) -> int:
        """How many of the workers would find places now: at least the least number, which was waited for.

        What is free says little: free cores may lie on different nodes, and what has just ended gives back its places
        a moment later. So it is tried.
        """
        import ray

        low, most = allotment.workers.minimum, self.capacity(allotment)
        if most <= low or self._finds_places(most, allotment, SECONDS_TO_GIVE_BACK):
            return max(low, most)
        high = min(most - 1, max(low, _in_sum(ray.available_resources(), allotment)))
        return largest(low, high, lambda n: self._finds_places(n, allotment, 2 * SECONDS_BETWEEN_LOOKS))

    def capacity(self, allotment: Allotment) -> int:
        """How many of the workers the nodes could hold, if nobody else were there."""
        there = workers_that_fit(cluster_nodes(), allotment.threads, allotment.gpu)
        return min(allotment.workers.maximum, there)

    def has_room_for_one_more(self, allotment: Allotment) -> bool:
        """Whether another worker would find a place now."""
        import ray

        free = _in_sum(ray.available_resources(), allotment)
        return free > 0 and self._finds_places(1, allotment, 2 * SECONDS_BETWEEN_LOOKS)

    def _finds_places(self, number: int, allotment: Allotment, seconds: int) -> bool:
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([allotment.bundle] * number)
        try:
            return bool(group.wait(seconds))
        finally:
            if not self.lost:
                remove_placement_group(group)


def _in_sum(free: dict[str, float], allotment: Allotment) -> int:
    """For how many workers there is enough, wherever it lies."""
    return min(int(free.get(name, 0) // each) for name, each in allotment.bundle.items())


def _is_of_rays_client(error: Exception) -> bool:
    """Whether it is an error of Ray's client about its connection: some of its calls let those of gRPC through."""
    if isinstance(error, ConnectionError):
        return error.errno is None  # else of a socket or pipe of somebody else's
    from_grpc = type(error).__module__.partition(".")[0] == "grpc"
    return from_grpc or (type(error) is Exception and NOT_CONNECTED in str(error))


def _forget_client() -> None:
    """As if this process had not been a client: to disconnect waits for the cluster, at the end of the process, too."""
    from ray.util import client

    client.ray.get_context().client_worker = None
    client.ray.disconnect()  # what is left of it in this process


def find_address(address: str | None) -> str | None:
    """Where the cluster is: as given, else by RAY_ADDRESS, else, of "auto", the one started last on this machine.

    Returns:
        HOST:PORT, ray://HOST:PORT, or None: Ray is started here. "auto" stays if Ray itself has to look.

    Example:
        >>> find_address("local"), find_address("ray://head:10001")
        (None, 'ray://head:10001')
    """
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        # What `ray start` has written down. Left to itself, Ray would take any cluster that runs here first.
        file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
        with contextlib.suppress(OSError):
            address = file.read_text().strip() or address
    return None if address == "local" else address


def from_environment(address: str | None) -> bool:
    """Whether an address is that of RAY_ADDRESS; a job that was submitted has it from Ray, not from the user."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return bool(address) and address == os.environ.get("RAY_ADDRESS") and not submitted


def named(address: str | None) -> str:
    """What sets an address, as an error message begins.

    Example:
        >>> named("head:6379")
        'runtime.address is'
    """
    if from_environment(address):
        return "RAY_ADDRESS (unset it to start Ray on this machine) is"
    return "runtime.address is"


class _Lost(KeyboardInterrupt):
    """Of the cluster, in the main thread, whatever it is doing; no library takes it for an error of its own."""


@contextlib.contextmanager
def noticing_its_loss(
    job: str, logs: Path, head: str, seconds: float, note: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside, the main thread is interrupted when the cluster's head is gone; Ray would end the process without a word.

    Elsewhere than in the main thread, which alone can be interrupted, it does nothing.

    Args:
        job: for the message.
        logs: of Ray, likewise.
        head: HOST:PORT of the cluster's head.
        seconds: without an answer, after which it is gone.
        note: called in the main thread when it is, before anything is unwound.

    Raises:
        IstanasError: the cluster was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    host, _, port = head.rpartition(":")
    words = f"{job}: Ray was lost (no answer from {head} for {seconds:.0f} s), see {logs}; {GOES_ON}"
    ended, main = threading.Event(), threading.get_ident()

    def watch() -> None:
        heard = time.monotonic()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                heard = time.monotonic()
            if time.monotonic() - heard > seconds:
                signal.pthread_kill(main, signal.SIGUSR1)
                end = time.monotonic() + SECONDS_TO_FINISH
                while working_to_an_end.is_set() and time.monotonic() < end:
                    if ended.wait(0.1):
                        return
                if not ended.wait(SECONDS_TO_UNWIND):
                    _die(words)
                return

    def interrupt(*_: Any) -> NoReturn:
        note()
        raise _Lost

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except _Lost:
        raise IstanasError(words) from None
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def _die(words: str) -> NoReturn:
    """End the process at once: its main thread hangs in a call of Ray's, until Ray does the same without a word."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the progress bar has hidden it
    try:
        os.write(2, f"{show_cursor}\nerror: {words}\n".encode(errors="replace"))
    finally:
        os._exit(1)


def check_address(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray would try again for minutes.

    Raises:
        IstanasError: with the remedy.

    Example:
        >>> check_address("auto")
    """
    if address == "auto":  # of the cluster that this machine belongs to; Ray answers at once if there is none
        return
    if address.startswith(("http://", "https://")):
        raise IstanasError(
            f"{named(address)} {address!r:.60}: that is the job server, for istanas submit; give HOST:PORT of the "
            "head node, ray://HOST:10001, or auto"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise IstanasError(
            f"{named(address)} {address!r:.60}: nobody answers there ({error}), start the cluster or give "
            "HOST:PORT of its head node (or auto)"
        ) from None


def ask_ray(address: str | None) -> Callable[[], bool]:
    """Begin to ask whether it is Ray that listens at an address; the result says so when it is called.

    In a process of its own, because Ray's client goes on trying for minutes and can't be stopped.
    """
    if address is None or address == "auto" or address.startswith("ray://"):
        return lambda: True
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    environment = {**(LOOPBACK_ONLY if _is_loopback_only(address) else {}), **os.environ}
    asking = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answer() -> bool:
        try:
            return asking.wait(SECONDS_TO_ANSWER) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            asking.kill()
            asking.wait()

    return answer


def _send_errors_to_log() -> None:
    """What Ray prints about lost workers and nodes goes to its log: stdout is for the user, or for `--json`.

    `log_to_driver` leaves these out, and what a client (ray://) is sent; and Ray offers nothing else.
    """
    import ray._private.worker as private
    from ray.util.client import logsclient

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("ray").warning("%s", "\n".join(map(str, data.get("lines", []))))

    private.print_to_stdstream = log
    client: Any = logsclient.LogstreamClient
    client.stdstream = lambda _, level, msg: logging.getLogger("ray").warning("%s", msg)


def _is_loopback_only(address: str) -> bool:
    """Whether a cluster listens on 127.0.0.1 and on no other address of this machine."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    own = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    for other in own:
        if not other.startswith("127."):
            with contextlib.suppress(OSError):  # refused, as it should be
                socket.create_connection((other, int(port)), timeout=2).close()
                return False
    return True


def allotment(settings: RuntimeSettings, nodes: Sequence[Node], *, may_come: bool = False) -> Allotment:
    """Workers, threads and device of a job on these nodes.

    Args:
        settings: what is asked for.
        nodes: what there is.
        may_come: GPUs that are asked for and not there are no mistake yet: the cluster may get them.
    """
    workers = settings.worker_range
    gpus = sum(node.gpus for node in nodes)
    if may_come and settings.device == "cuda":
        gpus = max(gpus, 1)
    compute = choose_compute(settings, gpus)
    gpu = compute.device.type == "cuda"
    threads = settings.threads
    if threads is None:  # of machines that have yet to come, one core is asked for
        to_come = gpu and all(node.gpus == 0 for node in nodes)
        threads = 1 if to_come else threads_per_worker(nodes, workers.maximum, gpu)
    return Allotment(workers, threads, compute)


def check_machine(settings: RuntimeSettings) -> None:
    """Refuse, before Ray is started here, what this machine can never hold: nothing is there to be waited for.

    More workers than cores take turns, up to two a core; what sets `runtime.threads` may not exceed the cores.

    Raises:
        IstanasError: with what there is and what is asked for.
    """
    here = this_machine()
    cores, gpus = here.cpus, here.gpus
    workers = settings.worker_range.minimum
    asked = allotment(settings, [Node(max(cores, workers), gpus)])
    fit = workers_that_fit([Node(cores, gpus)], asked.threads, asked.gpu)
    if settings.threads is None and not asked.gpu:
        fit = 2 * cores
    if workers > fit:
        raise IstanasError(
            f"waiting is of no use: {_bundles(workers, asked)} are asked for, this machine has "
            f"{count(cores, 'core')} and {count(gpus, 'GPU')}: lower --workers (or runtime.threads), or name a "
            "cluster with --address"
        )


def this_machine() -> Node:
    """What this machine has."""
    import torch

    return Node(usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


def last_line(error: BaseException | str) -> str:
    """The last line of what an error says: tracebacks of workers end with what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.200}"


def _bundles(number: int, allotment: Allotment) -> str:
    """What so many workers need, in words."""
    each = f"{count(allotment.threads, 'core')}{' and 1 GPU' if allotment.gpu else ''}"
    return f"{count(number, 'worker')} of {each}"


def _resources(free: dict[str, float]) -> str:
    return f"{count(int(free.get('CPU', 0)), 'core')}, {count(int(free.get('GPU', 0)), 'GPU')}"


class _Log(logging.FileHandler):
    """A log file; on a full disk it is left incomplete, without a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _log_to(file: Path) -> None:
    """Everything that Ray logs in this process goes to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _Log(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # The latter passes on nothing of what a client is sent.
    for name in ("ray", "ray.util.client.logsclient"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.propagate = False


def _session_of(logs: Path) -> Path | None:
    """Where a Ray session that was started here keeps its files."""
    link = logs / "session"
    return Path(os.readlink(link)) if link.is_symlink() else None


def _collect_logs(logs: Path) -> None:
    """Bring the logs of an ended Ray session into the run directory, and delete its other files."""
    scratch = _session_of(logs)
    if scratch is None:
        return
    for session in scratch.glob("session_2*"):
        try:
            shutil.copytree(
                session / "logs", logs / session.name, dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        except OSError:  # a full disk: logs must not take what room is left, nor hide why the job has failed
            shutil.rmtree(logs / session.name, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    (logs / "session").unlink()
