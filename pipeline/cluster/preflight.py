"""Pre-flight before a job on a cluster: storage, data, versions, MLflow's store, GPUs; one line each.

What would only show hours later, on a machine that nobody looks at, stops the job before it queues.
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

# The modules of what a node is asked, sent as code: a node without this project must be able to say so.
SENT_AS_CODE = (probe, servers)
# For a node: it may have to start a process, and to fetch the files of a submitted job.
SECONDS_TO_ANSWER = 60.0
PACKAGES = ("ray", "torch", "torchvision", "numpy", "scipy", "cvxpy", "scikit-learn", "pydantic", "optuna")
SAID = ("Python", "ray", "torch")  # of them
SPLITS = ("train", "test", "val")
# What each of torchvision's data sets has in its root.
FILES = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "mnist": ("MNIST/raw",),
    "fashion_mnist": ("FashionMNIST/raw",),
    "kmnist": ("KMNIST/raw",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "folder": SPLITS,
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive: Ray's id of it, and what people know it by."""

    id: str
    name: str


def check_nodes(
    config: Config, say: Say, *, trials: bool, known: set[str], seconds: float = SECONDS_TO_ANSWER
) -> None:
    """Ask every node of the cluster whether a job could run there, now or when it is started again.

    Args:
        config: of the job.
        say: told one line for each check that is passed.
        trials: whether nodes write to runs and store themselves, as trials of a sweep do.
        known: Ray's ids of nodes that have been asked before, which is not done again; those asked now are added.
        seconds: for a node to answer.

    Raises:
        IstanasError: for the first check that fails, with the nodes and the remedy; no mark is left behind.
    """
    nodes = [node for node in alive_nodes() if node.id not in known]
    if not nodes:
        return
    store = store_uri(config.tracking.uri) if config.tracking.enabled else None
    if store is not None:
        _check_store_from_here(store)
    # Trials write to the store themselves. Else only this process does, but a command may be started elsewhere again.
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
    passed = (  # all of them, before a word is said: a refusal is one line
        _check_versions(nodes, answers, here),
        _check_storage(nodes, blind),
        _check_data(nodes, answers, here, question),
        _check_store(nodes, answers, store, question),
    )
    for line in filter(None, passed):
        say(f"pre-flight: {line}")
    known.update(node.id for node in nodes)


def check_gpus(asked: int, there: int, wait_minutes: float, say: Say) -> None:
    """Say whether the GPUs asked for are there, or that they are waited for.

    Args:
        asked: how many the job needs.
        there: how many the cluster has now, busy ones included; one that can grow may have none.
        wait_minutes: how long they may take to come.
        say: told one line, if any are asked for.
    """
    if asked == 0:
        return
    line = f"pre-flight: GPUs: {asked} asked for, {there} there"
    if there < asked:
        line += f": waits for a node with the rest, at most {wait_minutes:g} minutes (runtime.wait_minutes)"
    say(line)


def alive_nodes() -> list[ClusterNode]:
    """The nodes that Ray counts as alive, those without any core included: a job may be started again there."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)
    return [
        ClusterNode(
            node["NodeID"],
            # Several nodes on one machine have its address in common.
            node["NodeManagerAddress"]
            + (f" ({node['NodeID'][:8]})" if addresses[node["NodeManagerAddress"]] > 1 else ""),
        )
        for node in nodes
    ]


def make_question(config: Config, store: str | None) -> Question:
    """What every node is asked.

    Args:
        config: of the job.
        store: MLflow's, if nodes write to it themselves.
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
    """A folder as other machines would have to call it; the address of a storage as it is."""
    return runs_dir if is_remote(runs_dir) else str(local(runs_dir).absolute())


def store_folder(store: str) -> str | None:
    """The folder that a store lies in; None if it is a server or a service.

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
    """Where the pictures must lie on every node, and which parts of that folder matter; see `Question`."""
    if data.name not in FILES or data.download:  # shipped with a package, or fetched by whoever lacks them
        return None, ()
    if data.root is not None:
        return str(Path(data.root).expanduser().resolve()), FILES[data.name]
    if data.cache_dir is not None:
        return str(Path(data.cache_dir).expanduser().resolve() / "downloads"), FILES[data.name]
    return "", FILES[data.name]


# ---------- the nodes are asked
def _ask(
    nodes: Sequence[ClusterNode], question: Question, marks: Sequence[str], seconds: float
) -> list[Answer]:
    """Have every node answer, all at once.

    Raises:
        IstanasError: if one does not.
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
        raise IstanasError(
            f"pre-flight: {_named(silent)}: no answer within {seconds:g} s; look at that machine and its disks, or "
            "take it out of the cluster (ray stop there)"
        )
    answers, failed = [], []
    for node, reference in zip(nodes, asked, strict=True):
        try:
            answers.append(Answer(**ray.get(reference)))
        except ray.exceptions.RayError as error:
            failed.append((node, error))
    if failed:
        why = str(failed[0][1]).strip().splitlines()[-1].strip()
        raise IstanasError(
            f"pre-flight: {_named(node for node, _ in failed)}: could not be asked ({why:.200}); look at Ray's logs "
            "there, or take it out of the cluster"
        )
    return answers


def _leave_marks(question: Question) -> None:
    for place in question.storage:
        try:
            probe.write_mark(place, question.token, question.token)
        except OSError as error:
            raise IstanasError(
                f"pre-flight: storage: {public_uri(place)} can't be written from here ({_reason(error)}); free or "
                "mount it, or set runtime.runs_dir to another"
            ) from None


def _blind(
    question: Question, nodes: Sequence[ClusterNode], marks: Sequence[str], answers: Sequence[Answer]
) -> dict[str, dict[ClusterNode, str]]:
    """For each place of the storage: the nodes that do not share it with this process, and why."""
    blind: dict[str, dict[ClusterNode, str]] = {place: {} for place in question.storage}
    for node, mark, answer in zip(nodes, marks, answers, strict=True):
        for place, reason in answer.storage.items():
            if not reason:
                try:
                    probe.read_mark(place, question.token + mark)
                except OSError as error:
                    reason = f"what it writes is not seen here: {_reason(error)}"
            if reason:
                blind[place][node] = reason
    return blind


def _delete_marks(question: Question, marks: Sequence[str]) -> None:
    for place in question.storage:
        for mark in marks:
            with contextlib.suppress(OSError):  # what can't be reached now was told of before
                probe.delete_mark(place, question.token + mark)


# ---------- what is said
def _check_versions(nodes: Sequence[ClusterNode], answers: Sequence[Answer], here: Answer) -> str:
    for node, answer in zip(nodes, answers, strict=True):
        if answer.code is None:
            raise IstanasError(
                f"pre-flight: versions: {node.name} does not have this project; install it there, or have it shipped "
                "by istanas submit"
            )
        other = [
            f"{name} {version} (here {here.versions[name]})"
            for name, version in answer.versions.items()
            if version != here.versions[name]
        ]
        if other:
            raise IstanasError(
                f"pre-flight: versions: {node.name} has {', '.join(other)}; install the same releases there (pip "
                "install -c constraints.txt)"
            )
        if answer.code != here.code:
            raise IstanasError(
                f"pre-flight: versions: {node.name} has other source files of this project (digest {answer.code}, here "
                f"{here.code}); bring it to the same commit, or have them shipped by istanas submit"
            )
    listed = ", ".join(f"{name} {version}" for name, version in here.versions.items() if name in SAID)
    return f"versions: the same on {count(len(nodes), 'node')} ({listed}, our files {here.code})"


def _check_storage(nodes: Sequence[ClusterNode], blind: dict[str, dict[ClusterNode, str]]) -> str:
    runs, *_ = blind
    for place, reasons in blind.items():
        if not reasons:
            continue
        where = f"{public_uri(place)} is not shared with {_named(reasons)} ({next(iter(reasons.values()))})"
        if place == runs:
            raise IstanasError(
                f"pre-flight: storage: runtime.runs_dir: {where}; a command or a trial that is started there would not "
                "find its run: choose a folder that all nodes share (NFS), or s3://BUCKET/PATH"
            )
        raise IstanasError(
            f"pre-flight: storage: tracking.uri: the folder {where}; trials there could not write to the store in it: "
            "use an MLflow server (http://HOST:PORT)"
        )
    places = " and ".join(public_uri(place) for place in blind)
    return f"storage: {count(len(nodes), 'node')} and this process share {places}"


def _check_data(
    nodes: Sequence[ClusterNode], answers: Sequence[Answer], here: Answer, question: Question
) -> str:
    if question.data is None:
        return ""
    place = question.data or "the cache's downloads"
    lacking = [node for node, answer in zip(nodes, answers, strict=True) if not answer.data]
    if lacking:
        raise IstanasError(
            f"pre-flight: data: data.root: {place} holds no such pictures on {_named(lacking)}; put them there under "
            "the same path, or mount a folder that all nodes share"
        )
    other = [node for node, answer in zip(nodes, answers, strict=True) if answer.data != here.data]
    if other:
        raise IstanasError(
            f"pre-flight: data: data.root: {place} holds other files on {_named(other)} than here; copy them anew"
        )
    return f"data: {count(len(nodes), 'node')} and this process have the same files in {place}"


def _check_store_from_here(store: str) -> None:
    reason = unreachable(public_uri(store))
    if reason:
        raise IstanasError(
            f"pre-flight: tracking: {public_uri(store)} is not reached from here ({reason}); {_STORE}"
        )


def _check_store(
    nodes: Sequence[ClusterNode], answers: Sequence[Answer], store: str | None, question: Question
) -> str:
    if store is None or store_folder(store) is not None:
        return ""
    lost = {node: answer.store for node, answer in zip(nodes, answers, strict=True) if answer.store}
    if lost:
        raise IstanasError(
            f"pre-flight: tracking: {public_uri(store)} is not reached from {_named(lost)} "
            f"({next(iter(lost.values()))}); {_STORE}"
        )
    where = f" and {count(len(nodes), 'node')}" if question.store is not None else ""
    return f"tracking: {public_uri(store)} is reached from here{where}"


_STORE = "start it, let it listen where nodes reach it, or correct MLFLOW_TRACKING_URI"


def _named(nodes: Iterable[ClusterNode], most: int = 3) -> str:
    names = [node.name for node in nodes]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{'node' if len(names) == 1 else 'nodes'} {', '.join(names[:most])}{more}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error).splitlines()[0]
