"""Slurm with two nodes on this machine: real daemons, with a network namespace and a host name for each node.

It requires root and the Debian packages slurm-wlm, munge and iproute2.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.namespaces import Network, address, refusal
from tests.waiting import poll, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
NODES = {f"n{number}": address(number) for number in (1, 2)}
CONF = """
ClusterName=test
SlurmctldHost=n1({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def lacking() -> str | None:
    """Return the reason why Slurm cannot run here, or None."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)"
    return refusal()


class Slurm:
    """The two nodes, inside `running`."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder = folder
        self._machines = dict(zip(NODES, network.machines, strict=True))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def ask(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a command on the first node, and return its stdout."""
        done = subprocess.run(
            self._on("n1", *command),
            cwd=cwd,
            env=self._with_conf(env),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start the daemons."""
        _write_conf(self.folder)
        self._daemon("munged", _munge(self.folder))
        for node, command in (("n1", "slurmctld"), ("n1", "slurmd"), ("n2", "slurmd")):
            self._daemon(f"{command}-{node}", self._on(node, command, "-D"))
        self._wait_until_idle()

    def end(self) -> None:
        """Kill the daemons and all processes in the namespaces of the nodes."""
        for machine in self._machines.values():
            poll(lambda machine=machine: _kill_all(machine) == 0, 5, interval=0.1)  # type: ignore[misc]
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()

    def logs(self) -> str:
        """Return the end of each daemon's log, for the message of a failed test."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _on(self, node: str, *command: str) -> list[str]:
        hostname = 'hostname "$0" && exec "$@"'
        inside = ["ip", "netns", "exec", self._machines[node], "unshare", "--uts", "sh", "-c", hostname, node]
        return [*inside, *command]

    def _with_conf(self, env: dict[str, str] | None = None) -> dict[str, str]:
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
        return {
            **(os.environ if env is None else env),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
        }

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out.log").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self._with_conf(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _wait_until_idle(self) -> None:
        def nodes() -> str:
            try:
                return self.ask("sinfo", "--noheader", "--format=%D %t").strip()
            except (AssertionError, subprocess.TimeoutExpired) as error:  # not up yet
                return str(error)

        wait_until(
            lambda: nodes() == f"{len(NODES)} idle",
            60,
            "Slurm's nodes",
            state=lambda: f"{nodes()}\n{self.logs()}",
            interval=0.3,
        )


@contextmanager
def running() -> Iterator[Slurm]:
    """Start two idle nodes, and remove everything afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Network(len(NODES)) as network:
            slurm = Slurm(folder, network)
            try:
                slurm.start()
                yield slurm
            finally:
                slurm.end()
    finally:
        shutil.rmtree(folder)


def _kill_all(machine: str) -> int:
    listed = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in listed.stdout.split()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _munge(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    folder.chmod(0o755)  # Otherwise munge rejects the folder of its socket.
    files = {
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    options = [f"--{option}={folder / file}" for option, file in files.items()]
    return ["munged", "--foreground", "--force", f"--key-file={key}", *options]


def _write_conf(folder: Path) -> None:
    nodes = "\n".join(f"NodeName={n} NodeAddr={a} CPUs=2 State=UNKNOWN" for n, a in NODES.items())
    for made in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / made).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, head=NODES["n1"], nodes=nodes))
    # No control groups are used, but Slurm has to load a plugin.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
