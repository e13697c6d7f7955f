"""A Ray runtime for the length of a command: started on this machine, or a cluster that is joined by its address.

What Ray has to say goes into log files; people hear only what it waits for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from istanas.errors import IstanasError
from pipeline.base.interruption import children_ignore_hangups, uninterrupted
from pipeline.base.socket_paths import OF_RAY, short_temporary_folder
from pipeline.base.text import last_line
from pipeline.cluster.address import (
    LOOPBACK_ONLY,
    NOT_RAY,
    ask_ray,
    check_address,
    find_address,
    from_environment,
    is_loopback_only,
    named,
)
from pipeline.cluster.allotment import (
    Allotment,
    allotment,
    check_machine,
    cluster_nodes,
    cores_and_gpus,
    describe_workers,
    this_machine,
    workers_in_sum,
)
from pipeline.cluster.loss import GOES_ON, SECONDS_BETWEEN_LOOKS, noticing_its_loss
from pipeline.cluster.ray_logs import collect_logs, log_to, send_errors_to_log, session_of
from pipeline.cluster.reservations import free_leftovers
from pipeline.config.schema import RuntimeSettings
from pipeline.config.workers import Node, largest, usable_cores, workers_that_fit
from pipeline.runs.layout import LOG_FOLDER

SECONDS_BEFORE_SAYING = 3.0
SECONDS_TO_GIVE_BACK = 5  # that places of workers which have ended may take to be free
# After 30 without its cluster, Ray's client forgets that it is one, and looks for a Ray that this machine is a node of.
SECONDS_OF_A_CLIENT = 20.0
NOT_CONNECTED = "Ray Client is not connected"  # what it then raises, as a mere Exception
NO_COLLECTORS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}
_TOKEN_FILE = Path("~/.ray/auth_token")

Say = Callable[[str], None]


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
        if self._logs is not None and session_of(self._logs) == self._scratch:
            collect_logs(self._logs)  # a second command may have begun here meanwhile: its logs are its own
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
        if self._address is None or is_loopback_only(self._address):
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
        collect_logs(self._logs)  # of a run that was killed
        log_to(self._logs / "driver.log")
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
        send_errors_to_log()
        try:
            with uninterrupted(), children_ignore_hangups():
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
                needs = f"{describe_workers(number, allotment)}; free now: {cores_and_gpus(ray.available_resources())}"
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
        high = min(most - 1, max(low, workers_in_sum(ray.available_resources(), allotment)))
        return largest(low, high, lambda n: self._finds_places(n, allotment, 2 * SECONDS_BETWEEN_LOOKS))

    def capacity(self, allotment: Allotment) -> int:
        """How many of the workers the nodes could hold, if nobody else were there."""
        there = workers_that_fit(cluster_nodes(), allotment.threads, allotment.gpu)
        return min(allotment.workers.maximum, there)

    def has_room_for_one_more(self, allotment: Allotment) -> bool:
        """Whether another worker would find a place now."""
        import ray

        free = workers_in_sum(ray.available_resources(), allotment)
        return free > 0 and self._finds_places(1, allotment, 2 * SECONDS_BETWEEN_LOOKS)

    def _finds_places(self, number: int, allotment: Allotment, seconds: int) -> bool:
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([allotment.bundle] * number)
        try:
            return bool(group.wait(seconds))
        finally:
            if not self.lost:
                remove_placement_group(group)


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
