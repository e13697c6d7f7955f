"""Pre-flight checks of a job on a cluster: storage, data, versions, MLflow's store and GPUs, one line each.

The checks report mistakes before the job is queued. Otherwise, a node would report them hours later.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from istanas.errors import IstanasError
from pipeline.base import servers
from pipeline.base.addresses import is_remote, sqlite_file
from pipeline.base.servers import unreachable
from pipeline.base.text import count
from pipeline.cluster import probe
from pipeline.cluster.probe import Answer, Question
from pipeline.config.schema import Config, DataSettings
from pipeline.runs.bucket import local
from pipeline.tracking.store import public_uri, store_uri

# Modules that run on the nodes. They are sent as code, so that a node that lacks this project can report that.
SENT_AS_CODE = (probe, servers)
# A node may have to start a process first, and to fetch the files of a submitted job.
SECONDS_TO_ANSWER = 60.0
PACKAGES = ("ray", "torch", "torchvision", "numpy", "scipy", "cvxpy", "scikit-learn", "pydantic", "optuna")
SHOWN_VERSIONS = ("Python", "ray", "torch")
START_SERVER = "start the server, let it listen where nodes reach it, or correct the address"

Say = Callable[[str], None]


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive: its id in Ray, and its name for messages."""

    id: str
    name: str


def check_nodes(
    config: Config, say: Say, *, trials: bool, known: set[str], seconds: float = SECONDS_TO_ANSWER
) -> None:
    """Check on every node of the cluster whether a job could run there, now or when it is resumed.

    Args:
        config: The job's configuration.
        say: Receives one line for each passed check.
        trials: Whether the nodes write to runs and to the store themselves, as trials of a sweep do.
        known: Ids of nodes that were checked before, which are skipped. Ids of newly checked nodes are added.
        seconds: The longest time to wait for a node's answer.

    Raises:
        IstanasError: The first failed check, with its nodes.
    """
    nodes = [node for node in alive_nodes() if node.id not in known]
    if not nodes:
        return
    store = store_uri(config.tracking.uri) if config.tracking.enabled else None
    store_setting = "MLFLOW_TRACKING_URI" if config.tracking.uri is None else "tracking.uri"
    if store is not None:
        _check_store_from_here(store, store_setting)
    # Trials write to the store themselves. Otherwise only this process does, but the command may be resumed on a node.
    server = public_uri(store) if store is not None and store.startswith(("http://", "https://")) else None
    question = make_question(config, store if trials else server)
    for place in question.storage:
        if "://" not in place:
            Path(place).mkdir(parents=True, exist_ok=True)
    marks = [f"-{node.id[:12]}" for node in nodes]
    try:
        _leave_marks(question)
        answers = _ask(nodes, question, marks, seconds)
        here = Answer(**probe.examine(vars(question), ""))
        blind = _blind(question, nodes, marks, answers)
    finally:
        _delete_marks(question, ["", *marks])
    passed = (  # All checks run before the first line is printed, so that a failure prints one line only.
        _check_versions(nodes, answers, here),
        _check_storage(nodes, blind, store_setting),
        _check_data(nodes, answers, here, question),
        _check_store(nodes, answers, store, question, store_setting),
    )
    for line in filter(None, passed):
        say(f"pre-flight: {line}")
    known.update(node.id for node in nodes)


def check_gpus(requested: int, there: int, wait_minutes: float, say: Say) -> None:
    """Report how many of the requested GPUs the cluster has, and whether the job waits for the others.

    Args:
        requested: The number of GPUs that the job needs.
        there: The number that the cluster has now, including busy ones. An autoscaling cluster may have none.
        wait_minutes: The longest time to wait.
        say: Receives one line, if any are requested.
    """
    if requested == 0:
        return
    line = f"pre-flight: GPUs: {requested} requested, {there} present"
    if there < requested:
        line += (
            f": waiting for nodes with the others, at most {wait_minutes:g} minutes (runtime.wait_minutes)"
        )
    say(line)


def alive_nodes() -> list[ClusterNode]:
    """Return the nodes that are alive, including those without cores, on which a command may be resumed."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)
    return [
        ClusterNode(
            node["NodeID"],
            # Nodes on one machine share its address.
            node["NodeManagerAddress"]
            + (f" ({node['NodeID'][:8]})" if addresses[node["NodeManagerAddress"]] > 1 else ""),
        )
        for node in nodes
    ]


def make_question(config: Config, store: str | None) -> Question:
    """Return the question for every node.

    Args:
        config: The job's configuration.
        store: MLflow's store, if nodes write to it themselves.
    """
    storage, reached, from_environment = [shared_place(config.runtime.runs_dir)], None, False
    if store is not None:
        folder = store_folder(store)
        if folder is not None:
            storage.append(folder)
        else:
            reached, from_environment = public_uri(store), public_uri(store) != store
    data, parts = data_place(config.data)
    return Question(
        packages=(*PACKAGES, "mosek") if config.space.solver == "mosek" else PACKAGES,
        storage=tuple(dict.fromkeys(storage)),
        token=uuid.uuid4().hex[:12],
        data=data,
        parts=parts,
        store=reached,
        store_in_environment=from_environment,
    )


def shared_place(runs_dir: str) -> str:
    """Return the absolute path of a folder, or the unchanged address of a bucket."""
    return runs_dir if is_remote(runs_dir) else str(local(runs_dir).absolute())


def store_folder(store: str) -> str | None:
    """Return the folder of a store, or None if the store is a server or a service.

    Example:
        >>> store_folder("sqlite:////a/mlflow.db"), store_folder("file:///a/mlruns"), store_folder("http://host:1")
        ('/a', '/a/mlruns', None)
    """
    file = sqlite_file(store)
    if file is not None:
        return str(file.parent.absolute())
    if store.startswith("file://") or ("://" not in store and not store.startswith("databricks")):
        return str(local(store).absolute())
    return None


def data_place(data: DataSettings) -> tuple[str | None, tuple[str, ...]]:
    """Return the folder of the pictures on every node, and the parts of it to compare; see `Question`."""
    entry = data.entry
    in_bucket = data.root is not None and is_remote(data.root)
    if not entry.parts or data.download or in_bucket:  # part of a package, or fetched by each node
        return None, ()
    if data.root is not None:
        root = Path(data.root).expanduser().resolve()
        is_file = entry.parts == ("",) and root.is_file()
        parts = ("",) if data.test_fraction > 0 else entry.parts  # the classes lie in the folder itself
        return (str(root.parent), (root.name,)) if is_file else (str(root), parts)
    if not entry.downloads:  # the code of a plugin is the same everywhere
        return None, ()
    if data.cache_dir is not None:
        return str(Path(data.cache_dir).expanduser().resolve() / "downloads"), entry.parts
    return "", entry.parts


# ---------- the question to the nodes
def _ask(
    nodes: Sequence[ClusterNode], question: Question, marks: Sequence[str], seconds: float
) -> list[Answer]:
    """Return the answers of all nodes, which are asked at the same time.

    Raises:
        IstanasError: A node does not answer.
    """
    import ray
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for module in SENT_AS_CODE:
        register_pickle_by_value(module)
    try:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(probe.examine)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                vars(question), mark
            )
            for node, mark in zip(nodes, marks, strict=True)
        ]
    finally:
        for module in SENT_AS_CODE:
            unregister_pickle_by_value(module)
    done, late = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    for reference in late:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(reference, force=True)
    silent = [node for node, reference in zip(nodes, asked, strict=True) if reference not in done]
    if silent:
        raise _failed(
            _named(silent),
            f"no answer within {seconds:g} s",
            "look at that machine and its disks, or remove it from the cluster (ray stop there)",
        )
    answers, failed = [], []
    for node, reference in zip(nodes, asked, strict=True):
        try:
            answers.append(Answer(**ray.get(reference)))
        except ray.exceptions.RayError as error:
            failed.append((node, error))
    if failed:
        why = str(failed[0][1]).strip().splitlines()[-1].strip()
        raise _failed(
            _named(node for node, _ in failed),
            f"the check failed to run ({why:.200})",
            "look at Ray's logs there, or remove it from the cluster",
        )
    return answers


def _leave_marks(question: Question) -> None:
    for place in question.storage:
        try:
            probe.write_mark(place, question.token, question.token)
        except OSError as error:
            raise _failed(
                "runtime.runs_dir",
                f"{public_uri(place)} cannot be written from this machine ({_reason(error)})",
                "free or mount it, or set runtime.runs_dir to another place",
            ) from None


def _blind(
    question: Question, nodes: Sequence[ClusterNode], marks: Sequence[str], answers: Sequence[Answer]
) -> dict[str, dict[ClusterNode, str]]:
    """Return, for each place of the storage, the nodes that do not share it with this process, and the reasons."""
    blind: dict[str, dict[ClusterNode, str]] = {place: {} for place in question.storage}
    for node, mark, answer in zip(nodes, marks, answers, strict=True):
        for place, reason in answer.storage.items():
            if not reason:
                try:
                    probe.read_mark(place, question.token + mark)
                except OSError as error:
                    reason = f"its files are not visible here: {_reason(error)}"
            if reason:
                blind[place][node] = reason
    return blind


def _delete_marks(question: Question, marks: Sequence[str]) -> None:
    for place in question.storage:
        for mark in marks:
            with contextlib.suppress(OSError):  # An unreachable place has been reported.
                probe.delete_mark(place, question.token + mark)


# ---------- the evaluation of the answers
def _check_versions(nodes: Sequence[ClusterNode], answers: Sequence[Answer], here: Answer) -> str:
    for node, answer in zip(nodes, answers, strict=True):
        if answer.code is None:
            raise _failed(
                _named([node]),
                "this project is not installed there",
                "install it, or ship it with istanas submit",
            )
        other = [
            f"{name} {version} (here {here.versions[name]})"
            for name, version in answer.versions.items()
            if version != here.versions[name]
        ]
        if other:
            raise _failed(
                _named([node]),
                f"other releases are installed there: {', '.join(other)}",
                "install the same releases (pip install -c constraints.txt)",
            )
        if answer.code != here.code:
            raise _failed(
                _named([node]),
                f"the source files of this project differ there (digest {answer.code}, here {here.code})",
                "use the same commit, or ship the files with istanas submit",
            )
    listed = ", ".join(
        f"{name} {version}" for name, version in here.versions.items() if name in SHOWN_VERSIONS
    )
    return f"versions: the same on {count(len(nodes), 'node')} ({listed}, our files {here.code})"


def _check_storage(
    nodes: Sequence[ClusterNode], blind: dict[str, dict[ClusterNode, str]], store_setting: str
) -> str:
    runs, *_ = blind
    for place, reasons in blind.items():
        if not reasons:
            continue
        where = f"{public_uri(place)} is not shared with {_named(reasons)} ({next(iter(reasons.values()))})"
        if place == runs:
            raise _failed(
                "runtime.runs_dir",
                f"{where}; a command or a trial that is started there would not find its run",
                "choose a folder that all nodes share (NFS), or s3://BUCKET/PATH",
            )
        raise _failed(
            store_setting,
            f"the folder {where}; trials there could not write to the store in it",
            "use an MLflow server (http://HOST:PORT)",
        )
    places = " and ".join(public_uri(place) for place in blind)
    return f"storage: {count(len(nodes), 'node')} and this process share {places}"


def _check_data(
    nodes: Sequence[ClusterNode], answers: Sequence[Answer], here: Answer, question: Question
) -> str:
    if question.data is None:
        return ""
    place = question.data or "the folder of downloads in the cache"
    lacking = [node for node, answer in zip(nodes, answers, strict=True) if not answer.data]
    if lacking:
        raise _failed(
            "data.root",
            f"{place} does not contain the data set on {_named(lacking)}",
            "copy them there, to the same path, or mount a folder that all nodes share",
        )
    other = [node for node, answer in zip(nodes, answers, strict=True) if answer.data != here.data]
    if other:
        raise _failed(
            "data.root", f"{place} contains other files on {_named(other)} than here", "copy them again"
        )
    return f"data: {count(len(nodes), 'node')} and this process have the same files in {place}"


def _check_store_from_here(store: str, setting: str) -> None:
    reason = unreachable(public_uri(store))
    if reason:
        problem = f"{public_uri(store)} is not reachable from this machine ({reason})"
        raise _failed(setting, problem, START_SERVER)


def _check_store(
    nodes: Sequence[ClusterNode],
    answers: Sequence[Answer],
    store: str | None,
    question: Question,
    setting: str,
) -> str:
    if store is None or store_folder(store) is not None:
        return ""
    lost = {node: answer.store for node, answer in zip(nodes, answers, strict=True) if answer.store}
    if lost:
        reason = next(iter(lost.values()))
        problem = f"{public_uri(store)} is not reachable from {_named(lost)} ({reason})"
        raise _failed(setting, problem, START_SERVER)
    where = f" and {count(len(nodes), 'node')}" if question.store is not None else ""
    return f"tracking: {public_uri(store)} is reachable from here{where}"


def _failed(field: str, problem: str, remedy: str) -> IstanasError:
    return IstanasError(problem, field=field, remedy=remedy, source="pre-flight")


def _named(nodes: Iterable[ClusterNode], most: int = 3) -> str:
    names = [node.name for node in nodes]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{'node' if len(names) == 1 else 'nodes'} {', '.join(names[:most])}{more}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error).splitlines()[0]
