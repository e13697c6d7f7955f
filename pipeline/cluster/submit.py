"""Submits a command to a cluster through Ray's job API: checked here first, then shipped with the working tree.

The command runs on the cluster as it would here, in a copy of the working directory that goes when the job ends:
what must last lies elsewhere, and what the job would look for in vain is refused before anything is uploaded.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from istanas.errors import ConfigError
from istanas.space import PUBLISHED
from pipeline.base.addresses import is_remote
from pipeline.base.redaction import without_secrets
from pipeline.cluster.job_server import ID, PROGRAM, JobServer, Write, is_loopback
from pipeline.cluster.working_tree import Parcel, megabytes, working_tree
from pipeline.config.combinations import check_batch_sizes
from pipeline.config.schema import Config, OneStageConfig
from pipeline.runs.bucket import local
from pipeline.tracking.store import public_uri

JOBS = ("search", "retrain", "run", "sweep")  # what can be submitted
STORE = "MLFLOW_TRACKING_URI"
# Ray shows a job's environment to everybody who sees the job.
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Submission:
    """A command as it was given, parsed and checked.

    Args:
        job: search, retrain, run or sweep.
        arguments: the whole command, `job` first.
        options: what the parser made of them, by name.
        config: the configuration that they mean.
        name: of the runs.
        store_of_cluster: MLFLOW_TRACKING_URI is set on the cluster's nodes, and not sent.
    """

    job: str
    arguments: tuple[str, ...]
    options: Mapping[str, Any]
    config: Config
    name: str
    store_of_cluster: bool

    @property
    def id(self) -> str:
        """A name for the job that says what it is, and is like no other."""
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.job}-{self.name}")
        return f"{words[:60]}-{uuid.uuid4().hex[:6]}"


def submit(submission: Submission, address: str, job_id: str | None, say: Write) -> tuple[JobServer, str]:
    """Check a command, pack the working directory and start the job.

    Args:
        submission: the command.
        address: of the job server.
        job_id: a name for the job; one is made up if None.
        say: takes lines for people.

    Returns:
        The server, and the job's id.

    Raises:
        ConfigError: one line per mistake; nothing was uploaded.
        IstanasError: the server does not take the job.
    """
    check(submission, address)
    if job_id is not None and ID.fullmatch(job_id) is None:
        raise ConfigError(f"--name {job_id!r:.80}: use letters, digits, dots, dashes and underscores only")
    parcel = working_tree(Path.cwd(), _not_shipped(submission.config))
    arguments = pack(submission, parcel)
    parcel.check()
    for name in SECRETS:
        if os.environ.get(name):
            say(
                f"{name} stays here, jobs show their environment: set it on the cluster's nodes, before Ray starts"
            )
    for link in parcel.links:
        say(f"not shipped: {link}, a link to a folder")
    server = JobServer(address)
    job_id = job_id or submission.id
    size = megabytes(parcel.size)  # the id is told first: whoever interrupts can ask for the job
    say(f"shipping {parcel.folder}: {len(parcel.files)} files, {size} before compression, as {job_id}")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "working_tree.zip"
        parcel.write(package)
        server.submit(
            command_line(arguments, submission.store_of_cluster), job_id, package, environment(submission)
        )
    return server, job_id


def check(submission: Submission, address: str) -> None:
    """Refuse what would fail on the cluster, or be lost there, as far as it is known here.

    Raises:
        ConfigError: one line per mistake.
    """
    config = submission.config
    if submission.options.get("dry_run"):
        raise ConfigError("--dry-run: starts nothing, run it here: the same command without submit")
    if submission.job != "sweep":  # whose space the command line has checked, see `check_space`
        both = submission.job == "run" and not isinstance(config, OneStageConfig)
        first = "retrain" if submission.job == "retrain" else "search"
        check_batch_sizes(config, ("search", "retrain") if both else (first,))
    problems = [*_lost(submission), *_unreachable(submission, address), *_shown(submission)]
    if problems:
        raise ConfigError("\n".join(problems))


def _lost(submission: Submission) -> list[str]:
    """What the job would write where it goes with the job, or can't write."""
    config, problems = submission.config, []
    folder = config.runtime.runs_dir
    if not is_remote(folder) and not local(folder).is_absolute():
        problems.append(
            f"runtime.runs_dir is {folder}: it would be lost with the job's working directory, name a folder that all "
            "nodes see (--set runtime.runs_dir=/SHARED/runs) or s3://BUCKET/PREFIX"
        )
    storage = None if config.sweep is None else config.sweep.storage
    if storage is not None and _is_relative(storage):
        problems.append(
            f"sweep.storage is {storage}: it would be lost with the job's working directory, give an absolute path "
            "that all nodes see, or the address of a database"
        )
    return problems


def _unreachable(submission: Submission, address: str) -> list[str]:
    """What the job would look for where it is not."""
    config, problems = submission.config, []
    if config.runtime.address is not None:
        problems.append(
            f"runtime.address is {without_secrets(config.runtime.address)}: the job joins the cluster that it runs "
            "on, leave it out (--set runtime.address=null)"
        )
    if submission.job != "sweep" and "workers" not in config.runtime.model_fields_set:
        problems.append(
            "runtime.workers is not set: give the command --workers N; 0 runs it in one process, on the head node"
        )
    root = config.data.root
    if root is not None and not Path(root).expanduser().is_absolute():
        problems.append(
            f"data.root is {root}: data are not shipped, give the absolute path at which all nodes see them"
        )
    if config.tracking.enabled:
        problems += _unreachable_store(submission, address)
    return problems


def _unreachable_store(submission: Submission, address: str) -> list[str]:
    given = submission.config.tracking.uri
    uri = given or os.environ.get(STORE)
    field = "tracking.uri" if given else STORE
    if given is None and submission.store_of_cluster:
        return []
    remedy = (
        f"set {STORE} to a server that all nodes reach (http://HOST:PORT), give --cluster-mlflow if the cluster's "
        "nodes have it set, or --set tracking.enabled=false"
    )
    if not uri:
        return [
            f"{STORE} is not set: MLflow's store would be lost with the job's working directory, {remedy}"
        ]
    if _is_relative(uri):
        return [f"{field} is {uri}: a path that would be lost with the job's working directory, {remedy}"]
    if uri.startswith(("http://", "https://")) and not _is_url(uri):
        return [f"{field} is no address of a server, {remedy}"]  # nor can the password in it be told apart
    if uri.startswith(("http://", "https://")) and is_loopback(uri) and not is_loopback(address):
        return [f"{field} is {public_uri(uri)}: on the cluster that is another machine, {remedy}"]
    return []


def _is_url(uri: str) -> bool:
    """Whether an address of a server can be read.

    Example:
        >>> _is_url("http://[::1]:5000"), _is_url("http://[::1"), _is_url("http://"), _is_url("http://h:port")
        (True, False, False, False)
    """
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _is_relative(uri: str) -> bool:
    """Whether a store lies in a relative path.

    Example:
        >>> [_is_relative(u) for u in ("sqlite:///a.db", "sqlite:////a.db", "mlruns", "http://h:1", "databricks")]
        [True, False, True, False, False]
    """
    scheme, colon, path = uri.partition(":///")
    if colon:
        return scheme.startswith("sqlite") and not path.startswith("/")
    return "://" not in uri and not uri.startswith(("/", "databricks"))


def _shown(submission: Submission) -> list[str]:
    """Passwords that everybody who sees the job would see."""
    hidden = "jobs show their command and environment: take it out of the address, and set"
    remedy = f"{hidden} MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
    problems = [
        f"{without_secrets(argument)!r:.100} holds a password; {remedy}, or write it to the configuration file"
        for argument in submission.arguments
        if without_secrets(argument) != argument
    ]
    uri = _sent_store(submission)
    if uri is not None and public_uri(uri) != uri:
        problems.append(f"{STORE} ({public_uri(uri)}) holds a password; {remedy}")
    return problems


def _sent_store(submission: Submission) -> str | None:
    """The store that goes along in the job's environment."""
    tracking = submission.config.tracking
    if not tracking.enabled or tracking.uri or submission.store_of_cluster:
        return None
    return os.environ.get(STORE)


def environment(submission: Submission) -> dict[str, str]:
    """The variables that go along: MLflow's address, and that nothing is told to anybody else."""
    names = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    store = _sent_store(submission)
    return variables if store is None else {**variables, STORE: store}


def pack(submission: Submission, parcel: Parcel) -> list[str]:
    """Take along the files that the command names; the command as it reads in the parcel.

    Raises:
        ConfigError: a genotype that the cluster can't find.
    """
    arguments = list(submission.arguments)
    given = submission.options.get("file")
    if given is not None:
        arguments = _renamed(arguments, "--config", given, parcel.add(Path(given)))
    genotype = submission.options.get("genotype")
    if genotype is not None:
        name = _shipped_genotype(genotype, submission.config, parcel)
        if given is None and name != genotype:
            _check_settings_go_along(genotype, submission.config)
        arguments = _renamed(arguments, "--genotype", genotype, name)
    return arguments


def _shipped_genotype(reference: str, config: Config, parcel: Parcel) -> str:
    """The reference as it holds on the cluster."""
    from pipeline.runs.directory import RunDir
    from pipeline.tracking.references import genotype_to_train

    path, runs = Path(reference).expanduser(), config.runtime.runs_dir
    shared = path.is_absolute() and not is_remote(runs)
    kept = shared and path.resolve().is_relative_to(local(runs).resolve())  # where the cluster's runs are
    run_here = any(RunDir(folder).exists() for folder in (path, local(runs) / reference))
    if reference in PUBLISHED or reference.startswith("random:") or path.is_file() or run_here:
        genotype_to_train(reference, config)  # refuses a bad one
    if path.is_file() and not kept:
        return parcel.add(path)
    if path.is_dir() and not path.is_absolute():
        raise ConfigError(
            f"--genotype {reference}: a folder here, which the cluster does not see, give {reference}/genotype.json, "
            "which is shipped"
        )
    names_a_file = "/" in reference or path.suffix == ".json"
    if names_a_file and "://" not in reference and not path.is_absolute():
        raise ConfigError(
            f"--genotype {reference}: no such file here, and the cluster sees none of this folder's; give a file, or "
            "a run by its absolute path or its name"
        )
    return reference


def _check_settings_go_along(genotype: str, config: Config) -> None:
    """Refuse a run's file that is shipped without its run, whose settings a retraining without `--config` has.

    Raises:
        ConfigError: with the remedy. The cluster would train on the digits.
    """
    from pipeline.tracking.references import resolve_origin

    runs_dir, tracking_uri = local(config.runtime.runs_dir), config.tracking.uri
    origin = resolve_origin(genotype, runs_dir=runs_dir, tracking_uri=tracking_uri)
    if origin is not None:
        raise ConfigError(
            f"--genotype {genotype}: a file of {origin.run}, whose data and tracking settings the cluster does not "
            "see; give --config with a file that has the settings of the retraining"
        )


def _renamed(arguments: Sequence[str], option: str, given: str, name: str) -> list[str]:
    """The arguments with another value of an option.

    Example:
        >>> _renamed(["search", "--config", "/a.yaml", "--config=/a.yaml"], "--config", "/a.yaml", "b.yaml")
        ['search', '--config', 'b.yaml', '--config=b.yaml']
    """
    renamed = []
    before = ""
    for argument in arguments:
        if before == option and argument == given:
            argument = name
        elif argument == f"{option}={given}":
            argument = f"{option}={name}"
        renamed.append(argument)
        before = argument
    return renamed


def command_line(arguments: Sequence[str], store_of_cluster: bool = False) -> str:
    """What the shell on the head node runs.

    Example:
        >>> command_line(["search", "--set", "data={name: digits}"])
        "python -m pipeline.cli search --set 'data={name: digits}'"
    """
    command = f"{PROGRAM} {shlex.join(arguments)}"
    if store_of_cluster:
        command = (
            f': "${{{STORE}:?is not set on this node, where --cluster-mlflow looks for it}}" && {command}'
        )
    return command


def _not_shipped(config: Config) -> list[Path]:
    """The folders of data and runs, as they really lie.

    Raises:
        ConfigError: the working directory is one, or lies in one.
    """
    runs, data = config.runtime.runs_dir, config.data
    given = {"runtime.runs_dir": None if is_remote(runs) else str(local(runs))}
    given |= {"data.root": data.root, "data.cache_dir": data.cache_dir}
    here, folders = Path.cwd().resolve(), []
    for setting, value in given.items():
        if not value or is_remote(value):
            continue
        folder = Path(value).expanduser().resolve()
        if here.is_relative_to(folder):
            raise ConfigError(
                f"{setting} is {value}: the working directory lies in it, and data and runs are not shipped; submit "
                "from the folder of your code"
            )
        folders.append(folder)
    return folders
