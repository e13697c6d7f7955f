"""A Ray runtime for the duration of a command: started on this machine, or a cluster that is joined by its address.

Ray's own messages are written to log files; the terminal only shows what the command waits for.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from istanas.errors import IstanasError
from pipeline.base.extras import RAY_DASHBOARD, check_extra
from pipeline.base.interruption import children_ignore_hangups, uninterrupted
from pipeline.base.socket_paths import RAY_SOCKET_PATH, short_temporary_folder
from pipeline.base.text import last_line
from pipeline.cluster.address import (
    HEAD_NODE,
    LOOPBACK_ONLY,
    address_error,
    ask_ray,
    check_address,
    find_address,
    from_environment,
    is_loopback_only,
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
from pipeline.cluster.ray_logs import collect_logs, log_to, send_errors_to_log, session_of
from pipeline.cluster.reservations import release_leftovers
from pipeline.config.schema import RuntimeSettings
from pipeline.config.threads import usable_cores
from pipeline.config.workers import Node, largest, workers_that_fit
from pipeline.runs.layout import LOG_FOLDER

SECONDS_BEFORE_MESSAGE = 3.0
# Timeouts of `PlacementGroup.wait` must be whole seconds, because Ray truncates fractions.
SECONDS_PER_WAIT = 1
SECONDS_TO_RELEASE = 5  # Ended workers may hold their resources for this long.
NO_COLLECTORS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}
_TOKEN_FILE = Path("~/.ray/auth_token")

Say = Callable[[str], None]


class Runtime:
    """Ray, from its first use in a command to the end of the `with` block.

    A process in which Ray is already initialized (a notebook, a trial of a sweep) keeps using that Ray.

    Args:
        settings: The address, the device and the number of workers.

    Raises:
        ConfigError: The job has workers, and the address is one that `find_address` rejects.
    """

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._logs: Path | None = None
        self._temp_dir: Path | None = None
        self._connected = False  # by this object
        self.examined: set[str] = set()  # ids of nodes that have passed the pre-flight checks
        self._tmpdir = os.environ.get("RAY_TMPDIR")  # the user's; a Ray that is started here gets its own
        if settings.address is not None or settings.worker_range.maximum > 0:
            self.check_address()

    @cached_property
    def _address(self) -> str | None:
        return find_address(self._settings.address)

    def check_address(self) -> None:
        """Reject an address that Ray cannot use, before any work starts.

        Raises:
            ConfigError: See `find_address`.
        """
        _ = self._address

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            import ray

            ray.shutdown()  # This also ends everything on a cluster that still runs for this process.
        self._connected = False
        # If another command has started in this run directory meanwhile, that command collects its logs.
        if self._logs is not None and session_of(self._logs) == self._temp_dir:
            collect_logs(self._logs)
        if self._temp_dir is not None:
            if self._tmpdir is None:
                os.environ.pop("RAY_TMPDIR", None)
            else:
                os.environ["RAY_TMPDIR"] = self._tmpdir
            # For a rejected job, which has no run directory, `collect_logs` has not deleted it.
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def start(self, run_dir: Path, *, dashboard: bool = False, say: Say | None = None) -> None:
        """Start or join Ray, unless this was done already.

        Args:
            run_dir: The run directory of the job, which receives Ray's logs.
            dashboard: Start Ray's dashboard, on 127.0.0.1. Ray Train asks it which jobs are alive, to release the
                resources of workers whose job was stopped from outside. The dashboard takes some seconds, and memory.
            say: Receives a line if only RAY_ADDRESS determines where the workers run.

        Raises:
            IstanasError: Ray does not answer at the address, this machine is too small for the workers, or packages of
                the dashboard are missing.
        """
        if self._connected:  # by another run of this command
            self._release_leftovers(run_dir / LOG_FOLDER)
            return
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            return
        if dashboard and self._address is None:
            check_extra("clusters", "runtime.workers", RAY_DASHBOARD)
        if say is not None and self.address_from_environment is not None:
            say(
                f"RAY_ADDRESS is {self.address_from_environment}: the workers run there; unset it to start Ray here"
            )
        if self._address is None:
            check_machine(self._settings)
        else:
            check_address(self._address)
        if self._address is None or is_loopback_only(self._address):
            # A Ray that is started here listens on 127.0.0.1 only. To join a cluster that does so, this process needs
            # the same setting; otherwise Ray replaces 127.0.0.1 by the machine's external address.
            os.environ.update({**LOOPBACK_ONLY, **os.environ})
        # Ray Train notices the end of workers within this time.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        # Importing Ray takes seconds, during which the answer arrives.
        wait_for_answer = ask_ray(self._address)
        import ray
        from ray._private import ray_constants

        # Ray reads the variable when it is imported, and a sweep has imported Ray earlier.
        ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) != "0"

        wait_for_answer()
        self._logs = run_dir / LOG_FOLDER
        collect_logs(self._logs)  # left by a killed run
        log_to(self._logs / "driver.log")
        options: dict[str, Any] = {"log_to_driver": False}
        if self._address is None:
            # Not in the run directory, which may lie on a shared disk, where Unix sockets do not always work.
            short = short_temporary_folder(RAY_SOCKET_PATH)
            self._temp_dir = Path(tempfile.mkdtemp(prefix="istanas-", dir=short))
            (self._logs / "session").symlink_to(self._temp_dir)  # before Ray starts, in case of a kill
            # Ray's processes look for their cluster's address in this folder, see below.
            os.environ["RAY_TMPDIR"] = str(self._temp_dir)
            # This machine is not preempted, and Ray's metrics are not read: collectors would only slow down workers.
            os.environ.update({**NO_COLLECTORS, **os.environ})
            cores = max(usable_cores(), self._settings.worker_range.minimum)
            options |= {"address": "local", "include_dashboard": dashboard, "_temp_dir": str(self._temp_dir)}
            options |= {"num_cpus": cores}
        else:
            options |= {"address": self._address}
        from pipeline.cluster.import_order import OwnPackagesFirst, hides_packages  # imports Ray

        if hides_packages(Path.cwd()):
            options |= {"job_config": OwnPackagesFirst()}
        send_errors_to_log()
        try:
            with uninterrupted(), children_ignore_hangups():
                ray.init(**options)
                self._connected = True
                if self._temp_dir is not None:
                    # Without this file, Ray's processes join any Ray of this machine, or none if there are several.
                    current = self._temp_dir / "ray" / "ray_current_cluster"
                    current.parent.mkdir(exist_ok=True)
                    current.write_text(ray.get_runtime_context().gcs_address)
        except Exception as error:  # Ray raises a bare Exception if a node takes too long to start.
            if self._address is None:
                raise IstanasError(
                    f"Ray could not be started ({last_line(error)})", remedy=f"see {self._logs}"
                ) from error
            problem = f"Ray does not answer at {self._address} ({last_line(error)})"
            raise address_error(self._address, problem, f"start the cluster, or {HEAD_NODE}") from error
        self._release_leftovers(self._logs)
        token = _TOKEN_FILE.expanduser()
        if token.is_file() and token.stat().st_uid == os.getuid() and os.access(token, os.W_OK):
            token.chmod(0o600)  # Ray creates it readable for every user.

    @property
    def address_from_environment(self) -> str | None:
        """The cluster's address if only the user's RAY_ADDRESS selects that cluster, otherwise None."""
        given = self._settings.address not in (None, "auto")
        return self._address if not given and from_environment(self._address) else None

    @property
    def joined(self) -> bool:
        """Whether this command has joined a cluster, rather than started Ray here or found it initialized."""
        return self._connected and self._address is not None

    def nodes(self, run_dir: Path, say: Say) -> list[Node]:
        """Join the cluster and return its nodes; without an address, return this machine.

        Args:
            run_dir, say: See `start`.

        Raises:
            IstanasError: Ray does not answer at the address.
        """
        if self._address is None:
            return [this_machine()]
        self.start(run_dir, say=say)
        return cluster_nodes()

    def allot(self) -> Allotment:
        """Divide the current resources of the cluster among the workers.

        Raises:
            ConfigError: The cluster has no device of the requested kind.
        """
        return allotment(self._settings, cluster_nodes(), may_come=self.joined)

    def wait(self, allotment: Allotment, say: Say) -> None:
        """Wait until the cluster has room for the minimum number of workers.

        The workers are requested as a placement group, so that an autoscaling cluster grows.

        Args:
            allotment: The resources of the workers.
            say: Receives one line that says what is missing.

        Raises:
            IstanasError: The resources were not free within `runtime.wait_minutes`.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        number = allotment.workers.minimum
        group = placement_group([allotment.bundle] * number)
        start, told = time.monotonic(), False
        try:
            while not group.wait(SECONDS_PER_WAIT):
                seconds = time.monotonic() - start
                needs = f"{describe_workers(number, allotment)}; free now: {cores_and_gpus(ray.available_resources())}"
                if not told and seconds > min(SECONDS_BEFORE_MESSAGE, 30 * self._settings.wait_minutes):
                    if self._logs is not None and self._release_leftovers(self._logs):
                        continue
                    told = True
                    say(f"waiting for {needs}; at most {self._settings.wait_minutes:g} minutes")
                if seconds > 60 * self._settings.wait_minutes:
                    raise IstanasError(
                        f"no room within {self._settings.wait_minutes:g} minutes for {needs}",
                        field="runtime.wait_minutes",
                        remedy="add nodes, wait for other jobs, or lower --workers, then run the same command again to "
                        "resume",
                    )
        finally:
            remove_placement_group(group)

    def _release_leftovers(self, logs: Path) -> bool:
        """Release what a killed process of the run still holds on this cluster; return whether there was anything."""
        # A Ray that was started here has no leftovers.
        return self.joined and release_leftovers(logs) > 0

    def room(self, allotment: Allotment) -> int:
        """Return the number of workers that would fit now, but at least the minimum, for which `wait` has waited.

        This tries placement groups, because the sum of free cores ignores their division into nodes, and workers that
        have just ended release their cores with a delay.
        """
        import ray

        low, most = allotment.workers.minimum, self.capacity(allotment)
        if most <= low or self._fits(most, allotment, SECONDS_TO_RELEASE):
            return max(low, most)
        high = min(most - 1, max(low, workers_in_sum(ray.available_resources(), allotment)))
        return largest(low, high, lambda n: self._fits(n, allotment, 2 * SECONDS_PER_WAIT))

    def capacity(self, allotment: Allotment) -> int:
        """Return the number of workers that the nodes could hold if there were no other jobs."""
        there = workers_that_fit(cluster_nodes(), allotment.threads, allotment.gpu)
        return min(allotment.workers.maximum, there)

    def has_room_for_one_more(self, allotment: Allotment) -> bool:
        """Return whether one more worker would fit now."""
        import ray

        free = workers_in_sum(ray.available_resources(), allotment)
        return free > 0 and self._fits(1, allotment, 2 * SECONDS_PER_WAIT)

    def _fits(self, number: int, allotment: Allotment, seconds: int) -> bool:
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([allotment.bundle] * number)
        try:
            return bool(group.wait(seconds))
        finally:
            remove_placement_group(group)
