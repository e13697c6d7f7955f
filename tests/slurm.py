"""Slurm with two nodes on this machine: real daemons, each node a network namespace with a host name of its own.

Needs root, slurm-wlm, munge and iproute2 (Debian's packages). What listens in the namespaces is not to be reached from
outside: all that joins them is a cable of their own.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "ip", "unshare")
NODES = {"n1": "10.213.7.1", "n2": "10.213.7.2"}
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
    """Why Slurm can't run here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "Slurm with its daemons and namespaces needs root"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)"
    return None


class Slurm:
    """The two nodes, while `running` lasts."""

    def __init__(self, folder: Path, namespaces: dict[str, str]) -> None:
        self.folder, self._namespaces = folder, namespaces

    def on(self, node: str, *command: str) -> list[str]:
        """A command line that runs a command on a node, whose names are known there as on any cluster."""
        setup = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["ip", "netns", "exec", self._namespaces[node], "unshare", "--uts", "--mount", "sh", "-c", setup]
        return [*inside, node, str(self.folder / "hosts"), *command]

    def ask(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """What a command on the first node prints."""
        environment = {**(os.environ if env is None else env), "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            self.on("n1", *command), cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def logs(self) -> str:
        """The end of every daemon's log, for a test that fails."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@contextmanager
def running() -> Iterator[Slurm]:
    """Start the daemons; afterwards, end whatever runs on the nodes, and remove them."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    name = secrets.token_hex(3)
    slurm = Slurm(folder, {node: f"istanas-{name}-{node}" for node in NODES})
    munged: subprocess.Popen[bytes] | None = None
    try:
        _cable(slurm._namespaces, name)
        munged = _start_munge(folder)
        _write_conf(folder)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for node, command in (("n1", "slurmctld"), ("n1", "slurmd"), ("n2", "slurmd")):
            out = (folder / f"{command}-{node}.out.log").open("wb")
            with out:  # they live in their namespaces, where they are found and ended
                subprocess.Popen(
                    slurm.on(node, command, "-D"), env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
        _wait_until_idle(slurm)
        yield slurm
    finally:
        for namespace in slurm._namespaces.values():
            _end_namespace(namespace)
        if munged is not None:
            munged.kill()
            munged.wait()
        shutil.rmtree(folder)


def _cable(namespaces: dict[str, str], name: str) -> None:
    """Two hosts with a cable between them."""
    for namespace in namespaces.values():
        _ip("netns", "add", namespace)
    ends = {node: f"ist{name}{node}" for node in NODES}
    one, two = NODES
    _ip("link", "add", ends[one], "netns", namespaces[one], "type", "veth", "peer", "name", ends[two], "netns", namespaces[two])
    for node, address in NODES.items():
        inside = ("-n", namespaces[node])
        _ip(*inside, "address", "add", f"{address}/24", "dev", ends[node])
        _ip(*inside, "link", "set", ends[node], "up")
        _ip(*inside, "link", "set", "lo", "up")


def _start_munge(folder: Path) -> "subprocess.Popen[bytes]":
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    folder.chmod(0o755)  # else munge finds its socket unreachable
    files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / file}" for option, file in files.items()]
    return subprocess.Popen(
        ["/usr/sbin/munged", "--foreground", "--force", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _write_conf(folder: Path) -> None:
    nodes = "\n".join(f"NodeName={n} NodeAddr={a} CPUs=2 State=UNKNOWN" for n, a in NODES.items())
    for made in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / made).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, head=NODES["n1"], nodes=nodes))
    names = {"localhost": "127.0.0.1", **NODES}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _wait_until_idle(slurm: Slurm) -> None:
    end = time.monotonic() + 60
    answer = ""
    while time.monotonic() < end:
        try:
            answer = slurm.ask("sinfo", "--noheader", "--format=%D %t")
        except (AssertionError, subprocess.TimeoutExpired) as error:  # not up yet
            answer = str(error)
        if answer.strip() == f"{len(NODES)} idle":
            return
        time.sleep(0.3)
    raise AssertionError(f"Slurm did not start: {answer}\n{slurm.logs()}")


def _end_namespace(namespace: str) -> None:
    """Everything in it is ours."""
    for _ in range(50):
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
        pids = [int(pid) for pid in listed.stdout.split()]
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)
