"""Submission of a command to a cluster's job server, with checks on this machine and the files of the working tree.

The command runs on the cluster as it would here, in a copy of the working directory that Ray deletes after the job.
Results must therefore be stored elsewhere, and files that the job would not find are rejected before the upload.
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
from pipeline.base.addresses import is_remote
from pipeline.base.redaction import without_secrets
from pipeline.cluster.job_server import ID, PROGRAM, JobServer, Write, is_loopback
from pipeline.cluster.working_tree import Package, megabytes, working_tree
from pipeline.config.combinations import check_batch_sizes
from pipeline.config.schema import Config
from pipeline.runs.bucket import local
from pipeline.tracking.store import public_uri

JOBS = ("search", "retrain", "run", "sweep")  # commands that can be submitted
STORE = "MLFLOW_TRACKING_URI"
# Variables that are not sent: Ray shows a job's environment to everyone who sees the job.
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Submission:
    """A parsed command to submit.

    Args:
        job: search, retrain, run or sweep.
        arguments: The whole command, beginning with `job`.
        options: The parsed options, by name.
        config: The configuration of the job.
        name: The name of the runs.
        store_of_cluster: Whether the cluster's nodes have MLFLOW_TRACKING_URI set, so that it is not sent.
    """

    job: str
    arguments: tuple[str, ...]
    options: Mapping[str, Any]
    config: Config
    name: str
    store_of_cluster: bool

    @property
    def id(self) -> str:
        """A new, unique name for the job, which contains the command and the name of the runs."""
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.job}-{self.name}")
        return f"{words[:60]}-{uuid.uuid4().hex[:6]}"


def submit(submission: Submission, address: str, job_id: str | None, say: Write) -> tuple[JobServer, str]:
    """Check a command, pack the working directory and start the job.

    Args:
        submission: The command.
        address: The address of the job server.
        job_id: A name for the job; None generates one.
        say: Receives lines for the terminal.

    Returns:
        The server, and the job's name.

    Raises:
        ConfigError: The command has mistakes, listed one per line; nothing was uploaded.
        IstanasError: The server rejects the job.
    """
    check(submission, address)
    if job_id is not None and ID.fullmatch(job_id) is None:
        raise ConfigError(
            f"{job_id!r:.80} is not a valid job name",
            field="--name",
            remedy="use letters, digits, dots, dashes and underscores only",
        )
    package = working_tree(Path.cwd(), _not_shipped(submission.config))
    arguments = pack(submission, package)
    package.check()
    for name in SECRETS:
        if os.environ.get(name):
            say(
                f"{name} is not sent, because jobs show their environment: set it on the cluster's nodes before Ray "
                "starts"
            )
    for link in package.links:
        say(f"not shipped: {link}, a link to a folder")
    server = JobServer(address)
    job_id = job_id or submission.id
    # The name is printed before the upload, so that a user who interrupts it can look for the job.
    size = megabytes(package.size)
    say(f"shipping {package.folder}: {len(package.files)} files, {size} before compression, as {job_id}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "working_tree.zip"
        package.write(file)
        command = command_line(arguments, submission.store_of_cluster)
        server.submit(command, job_id, file, environment(submission))
    return server, job_id


def check(submission: Submission, address: str) -> None:
    """Reject a command that would fail on the cluster or lose its results there, as far as this machine can tell.

    Raises:
        ConfigError: The command has mistakes, listed one per line.
    """
    config = submission.config
    if submission.options.get("dry_run"):
        raise ConfigError(
            "it starts nothing",
            field="--dry-run",
            remedy="run the same command on this machine, without submit",
        )
    if submission.job != "sweep":  # The command line checks the space of a sweep, see `check_space`.
        both = submission.job == "run" and not config.trains_target
        first = "retrain" if submission.job == "retrain" else "search"
        check_batch_sizes(config, ("search", "retrain") if both else (first,))
    problems = [
        *_lost_results(submission),
        *_unreachable(submission, address),
        *_exposed_passwords(submission),
    ]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def _lost_results(submission: Submission) -> list[ConfigError]:
    """Return an error for each location of results that would be deleted with the job."""
    config, problems = submission.config, []
    lost = "would be deleted with the job's working directory"
    folder = config.runtime.runs_dir
    if not is_remote(folder) and not local(folder).is_absolute():
        remedy = (
            "name a folder that all nodes share (--set runtime.runs_dir=/SHARED/runs) or s3://BUCKET/PREFIX"
        )
        problems.append(ConfigError(f"{folder} {lost}", field="runtime.runs_dir", remedy=remedy))
    storage = None if config.sweep is None else config.sweep.storage
    if storage is not None and _is_relative(storage):
        remedy = "give an absolute path that all nodes share, or the address of a database"
        problems.append(ConfigError(f"{storage} {lost}", field="sweep.storage", remedy=remedy))
    return problems


def _unreachable(submission: Submission, address: str) -> list[ConfigError]:
    """Return an error for each setting that is not valid on the cluster."""
    config, problems = submission.config, []
    if config.runtime.address is not None:
        problems.append(
            ConfigError(
                f"{without_secrets(config.runtime.address)} is not used: the job joins the cluster that it runs on",
                field="runtime.address",
                remedy="leave it out (--set runtime.address=null)",
            )
        )
    by_trials = submission.job == "sweep" or (submission.job == "search" and config.search.trials_at_once > 1)
    if not by_trials and "workers" not in config.runtime.model_fields_set:
        remedy = "give the command --workers N; 0 runs it in one process, on the head node"
        problems.append(ConfigError("not set", field="runtime.workers", remedy=remedy))
    root = config.data.root
    if root is not None and not is_remote(root) and not Path(root).expanduser().is_absolute():
        remedy = "give the absolute path of the data on all nodes"
        problems.append(
            ConfigError(f"{root} is relative, and data are not shipped", field="data.root", remedy=remedy)
        )
    if config.tracking.enabled:
        problems += _unreachable_store(submission, address)
    return problems


def _unreachable_store(submission: Submission, address: str) -> list[ConfigError]:
    given = submission.config.tracking.uri
    uri = given or os.environ.get(STORE)
    if given is None and submission.store_of_cluster:
        return []
    problem = None
    if not uri:
        problem = "not set: MLflow's store would be deleted with the job's working directory"
    elif _is_relative(uri):
        problem = f"{uri} would be deleted with the job's working directory"
    elif uri.startswith(("http://", "https://")):
        if not _is_url(uri):
            problem = "not the address of a server"  # not shown, because it may contain a password
        elif is_loopback(uri) and not is_loopback(address):
            problem = f"{public_uri(uri)} is another machine on the cluster"
    if problem is None:
        return []
    remedy = (
        f"set {STORE} to a server that all nodes reach (http://HOST:PORT), give --cluster-mlflow if the cluster's "
        "nodes have it set, or --set tracking.enabled=false"
    )
    return [ConfigError(problem, field="tracking.uri" if given else STORE, remedy=remedy)]


def _is_url(uri: str) -> bool:
    """Return whether the address of a server is complete.

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
    """Return whether a store is a relative path.

    Example:
        >>> [_is_relative(u) for u in ("sqlite:///a.db", "sqlite:////a.db", "mlruns", "http://h:1", "databricks")]
        [True, False, True, False, False]
    """
    scheme, colon, path = uri.partition(":///")
    if colon:
        return scheme.startswith("sqlite") and not path.startswith("/")
    return "://" not in uri and not uri.startswith(("/", "databricks"))


def _exposed_passwords(submission: Submission) -> list[ConfigError]:
    """Return an error for each password that would be visible to everyone who sees the job."""
    contains = "contains a password, and jobs show their command and environment"
    remedy = "remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
    problems = [
        ConfigError(
            f"{without_secrets(argument)!r:.100} {contains}",
            remedy=f"{remedy}, or write it to the configuration file",
        )
        for argument in submission.arguments
        if without_secrets(argument) != argument
    ]
    uri = _sent_store(submission)
    if uri is not None and public_uri(uri) != uri:
        problems.append(ConfigError(f"{public_uri(uri)} {contains}", field=STORE, remedy=remedy))
    return problems


def _sent_store(submission: Submission) -> str | None:
    """Return the MLflow store that is sent in the job's environment, or None."""
    tracking = submission.config.tracking
    if not tracking.enabled or tracking.uri or submission.store_of_cluster:
        return None
    return os.environ.get(STORE)


def environment(submission: Submission) -> dict[str, str]:
    """Return the variables that are sent: MLflow's address, and the switches that turn telemetry off."""
    names = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    store = _sent_store(submission)
    return variables if store is None else {**variables, STORE: store}


def pack(submission: Submission, package: Package) -> list[str]:
    """Add the files that the command names to the package, and return the command with their new names.

    Raises:
        ConfigError: The cluster cannot find a genotype.
    """
    arguments = list(submission.arguments)
    given = submission.options.get("file")
    if given is not None:
        arguments = _renamed(arguments, "--config", given, package.add(Path(given)))
    for plugin in dict.fromkeys(submission.options.get("plugins", ())):
        # Ray's workers get the plugin from the job; the job reads this copy.
        arguments = _renamed(arguments, "--plugin", plugin, package.add(Path(plugin).expanduser()))
    genotype = submission.options.get("genotype")
    if genotype is not None:
        name = _shipped_genotype(genotype, submission.config, package)
        if given is None and name != genotype:
            _check_settings_are_shipped(genotype, submission.config)
        arguments = _renamed(arguments, "--genotype", genotype, name)
    return arguments


def _shipped_genotype(reference: str, config: Config, package: Package) -> str:
    """Return a reference to the genotype that is valid on the cluster; a file is added to the package."""
    from pipeline.runs.directory import RunDir
    from pipeline.tracking.references import genotype_to_train, origin_of

    path, runs = Path(reference).expanduser(), config.runtime.runs_dir
    shared = path.is_absolute() and not is_remote(runs)
    # A file in the runs folder has the same path on the cluster.
    in_runs = shared and path.resolve().is_relative_to(local(runs).resolve())
    run_here = any(RunDir(folder).exists() for folder in (path, local(runs) / reference))
    described = origin_of(reference) is not None
    if described or path.is_file() or run_here:
        genotype_to_train(reference, config)  # rejects an invalid genotype
    if path.is_file() and not in_runs:
        return package.add(path)
    if path.is_dir() and not path.is_absolute():
        raise ConfigError(
            f"{reference} is a folder on this machine, which the cluster does not see",
            field="--genotype",
            remedy=f"give {reference}/genotype.json, which is shipped",
        )
    names_a_file = not described and ("/" in reference or path.suffix == ".json")
    if names_a_file and "://" not in reference and not path.is_absolute():
        raise ConfigError(
            f"no such file on this machine: {reference}",
            field="--genotype",
            remedy="give a file, or a run by its absolute path or its name",
        )
    return reference


def _check_settings_are_shipped(genotype: str, config: Config) -> None:
    """Reject a genotype file of a run for a retraining without `--config`, which would need the run's settings.

    Raises:
        ConfigError: The job would use the default settings instead, which train on the digits.
    """
    from pipeline.tracking.references import resolve_origin

    runs_dir, tracking_uri = local(config.runtime.runs_dir), config.tracking.uri
    origin = resolve_origin(genotype, runs_dir=runs_dir, tracking_uri=tracking_uri)
    if origin is not None:
        raise ConfigError(
            f"{genotype} is a file of {origin.run}, whose data, space and tracking settings the cluster does not see",
            field="--genotype",
            remedy="give --config with a file that has the settings of the retraining",
        )


def _renamed(arguments: Sequence[str], option: str, given: str, name: str) -> list[str]:
    """Return the arguments with another value of an option.

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
    """Return the shell command for the head node.

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
    """Return the resolved folders of data and runs.

    Raises:
        ConfigError: The working directory is one of them, or lies in one.
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
                f"{value} contains the working directory, and data and runs are not shipped",
                field=setting,
                remedy="submit from the folder of your code",
            )
        folders.append(folder)
    return folders
