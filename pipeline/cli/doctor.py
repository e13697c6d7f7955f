"""Checks of what a run requires on this machine. Each check is one line, with a remedy if something is missing."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from istanas.errors import IstanasError
from pipeline.base.addresses import sqlite_file
from pipeline.base.extras import EXTRAS
from pipeline.base.servers import by_proxy, unreachable
from pipeline.base.text import count, one_line
from pipeline.config.schema import DataSettings
from pipeline.config.threads import threads_in_process, threads_per_worker, usable_cores
from pipeline.config.workers import Node, parse_workers
from pipeline.tracking.store import open_client, public_uri, store_uri

State = Literal["ok", "warn", "fail"]

NEEDED_PYTHON = (3, 11)
_DISTRIBUTION = "istanas"


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Args:
        name: What was checked.
        state: Whether a run can use what was checked.
        message: What was found.
        remedy: What to do, or an empty string.
    """

    name: str
    state: State
    message: str
    remedy: str = ""


def run_checks(
    *,
    tracking_uri: str | None,
    data: DataSettings,
    workers: int | str = 0,
    threads: int | None = None,
    address: str | None = None,
) -> list[Check]:
    """Check everything that a run requires, without downloading or changing anything.

    Args:
        tracking_uri: See `pipeline.tracking.store.store_uri`.
        data: The settings of the data set.
        workers, threads: See `check_threads`.
        address: Address of a Ray cluster; None for this machine.

    Returns:
        The checks of Python and its packages, GPUs, cores and threads, MLflow's store, MOSEK's licence, the data and
        the disk space. With an address, the cluster is checked instead of cores and threads.
    """
    from pipeline.cluster.address import find_address

    cluster = find_address(address)
    return [
        check_packages(),
        check_gpus(),
        check_threads(workers, threads) if cluster is None else check_cluster(cluster),
        check_store(tracking_uri),
        check_mosek(),
        check_data(data),
        check_disk(Path.cwd()),
    ]


def check_packages(requirements: Sequence[str] | None = None) -> Check:
    """Check the versions of Python and of every required package.

    Args:
        requirements: Requirements as in pyproject.toml; None for those of the project.
    """
    name, python = "packages", ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < NEEDED_PYTHON:
        needed = ".".join(map(str, NEEDED_PYTHON))
        return Check(name, "fail", f"Python {python} is too old", f"use Python {needed} or newer")
    requirements = _requirements() if requirements is None else requirements
    if not requirements:
        return Check(name, "warn", f"Python {python}; the required packages are unknown", "pip install -e .")
    unmet = list(_unmet(requirements))
    if unmet:
        asked = " ".join(f"'{requirement}'" for requirement, _ in unmet)
        found = ", ".join(what for _, what in unmet)
        return Check(name, "fail", f"Python {python}; {found}", f"pip install {asked}")
    extras = [extra for extra, modules in EXTRAS.items() if all(map(importlib.util.find_spec, modules))]
    listed = f"{len(requirements)} packages as required; extras: {', '.join(extras) or 'none'}"
    return Check(name, "ok", f"Python {python}; {listed}")


def check_gpus() -> Check:
    """List the CUDA devices and their memory. Without any, everything runs on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "ok", f"none (torch {torch.__version__}); everything runs on the CPU")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    listed = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    return Check("gpu", "ok", f"{len(devices)}: {listed}")


def check_cluster(address: str) -> Check:
    """Check that a Ray cluster answers at an address.

    Args:
        address: An address as in `runtime.address`.
    """
    from pipeline.cluster.address import ask_ray, check_address, from_environment

    try:
        check_address(address)
        wait_for_answer = ask_ray(address)
        wait_for_answer()
    except IstanasError as error:
        return Check("cluster", "fail", f"{error.field}: {error.problem}", error.remedy or "")
    by = " (RAY_ADDRESS)" if from_environment(address) else ""
    return Check(
        "cluster", "ok", f"Ray answers at {address}{by}; each worker gets cores / workers threads there"
    )


def check_threads(workers: int | str = 0, threads: int | None = None) -> Check:
    """Check that the workers of a run have no more threads than this machine has usable cores.

    Args:
        workers: As `runtime.workers`.
        threads: Threads of each worker, as `runtime.threads`; None divides the cores among the workers.
    """
    cores, number = usable_cores(), max(parse_workers(workers).maximum, 1)
    in_process = parse_workers(workers).maximum == 0
    if in_process:
        threads = threads_in_process(threads)
    elif threads is None:
        threads = threads_per_worker([Node(cores)], number, gpu=False)
    of = "in one process" if in_process else count(number, "worker")
    message = f"{count(cores, 'core')} usable; {of}, {count(threads, 'thread')} each"
    if number * threads > cores:
        return Check("cores", "warn", message, f"workers x threads should not exceed {cores}")
    return Check("cores", "ok", message)


def check_store(tracking_uri: str | None) -> Check:
    """Check that MLflow's store answers. A SQLite file that does not exist is not created."""
    name, uri = "mlflow", store_uri(tracking_uri)
    shown, file = public_uri(uri), sqlite_file(uri)
    if file is not None and not file.exists():
        if os.access(file.parent, os.W_OK):
            return Check(name, "ok", f"{shown} (the first run creates it)")
        why = "can't be written" if file.parent.exists() else "does not exist"
        return Check(
            name,
            "fail",
            f"{shown}: {file.parent} {why}",
            "use another working directory or set MLFLOW_TRACKING_URI",
        )
    remedy = "start it, or set MLFLOW_TRACKING_URI; runs continue without it, and `istanas sync` delivers them later"
    if why := unreachable(public_uri(uri)):  # MLflow's client would retry for minutes
        return Check(name, "fail", f"{shown}: {why}", remedy)
    try:
        experiments = open_client(uri).search_experiments()
    except Exception as error:  # stores raise errors of many classes
        return Check(name, "fail", f"{shown}: {one_line(error, limit=120)}{by_proxy(uri)}", remedy)
    return Check(name, "ok", f"{shown} ({len(experiments)} experiments)")


def check_mosek() -> Check:
    """Check MOSEK's licence, which only the solver "mosek" requires."""
    from istanas.sparse import mosek_licence

    licence = mosek_licence()
    if licence is not None:
        return Check("mosek", "ok", licence)
    remedy = (
        "the solvers homotopy, clarabel, ista and fista require none; "
        "for mosek, put the file at ~/mosek/mosek.lic or name it in MOSEKLM_LICENSE_FILE"
    )
    return Check("mosek", "warn", "no usable licence", remedy)


def check_data(data: DataSettings) -> Check:
    """Check that a job can use the pictures. The files of a picture folder are listed but not decoded.

    Args:
        data: The settings of the data set.
    """
    try:
        return _check_data_set(data) if data.entry.survey is None else _check_folder(data)
    except IstanasError as error:
        message = ": ".join(part for part in (error.source, error.field, error.problem) if part is not None)
        return Check("data", "fail", message, error.remedy or "set data.name and data.root")


def _check_data_set(data: DataSettings) -> Check:
    from pipeline.training.pictures import check_size, load_pictures

    dataset = load_pictures(data, download=False)
    check_size(dataset.name, dataset.height, dataset.width)
    return Check("data", "ok", "; ".join(dataset.notes) or f"{data.name} can be loaded")


def _check_folder(data: DataSettings) -> Check:
    from pipeline.runs.record import describe_missing
    from pipeline.training.pictures import check_size, decode_settings_of, survey_of

    survey = survey_of(data, keep=False)
    assert survey is not None, "the caller has checked that the files can be surveyed"
    check_size(data.name, *survey.shape(data.image_size))
    lines, remedies = [*survey.notes(data.image_size, decode_settings_of(data, survey))], []
    listing = survey.listing
    if listing.untested:
        lines.append(describe_missing("test", listing.untested, len(listing.class_names)))
        remedies.append("add test pictures of every class")
    if listing.left_out:
        remedies.append("move or convert the files that are left out, if they belong to the data")
    return Check("data", "warn" if remedies else "ok", "; ".join(lines), "; ".join(remedies))


def check_disk(folder: Path, *, enough_gb: float = 5.0) -> Check:
    """Check the disk space for checkpoints, decoded pictures and MLflow's files.

    Args:
        folder: A folder on the disk.
        enough_gb: Free space in GB that suffices for most runs.
    """
    free = shutil.disk_usage(folder).free / 1e9
    message = f"{free:.1f} GB free in {folder}"
    if free < enough_gb:
        return Check("disk", "warn", message, f"free some space: {enough_gb:.0f} GB are enough for most runs")
    return Check("disk", "ok", message)


def _requirements() -> list[str]:
    """Return the requirements of the installed distribution or of pyproject.toml, without extras."""
    try:
        found = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parents[2] / "pyproject.toml"
        if not file.is_file():
            return []
        found = tomllib.loads(file.read_text())["project"]["dependencies"]
    return [text for text in found if "extra ==" not in text]


def _unmet(requirements: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the requirements that are not met, each with what was found instead."""
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield wanted, f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield wanted, f"{requirement.name} {version} is not {requirement.specifier}"
