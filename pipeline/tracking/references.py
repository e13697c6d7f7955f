"""References to runs and genotypes on the command line, and how they are resolved.

A RUN is a run directory, an MLflow run id, or a unique name. Local files are searched first, so that a finished run
is found without MLflow.
"""

import difflib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from istanas.errors import CheckpointError, ConfigError, GenotypeError
from istanas.methods import trains_target
from istanas.space import PUBLISHED, Genotype, SearchSpace, parsed_genotype, random_genotype
from pipeline.base.addresses import checked_address, is_remote, sqlite_file
from pipeline.base.text import one_line, percent
from pipeline.config.load import load
from pipeline.config.plugins import explain_missing
from pipeline.config.schema import Config
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import read_genotype
from pipeline.runs.layout import BEST_FOLDER, CONFIG_FILE, GENOTYPE_FILE, RECORD_FILE
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.outcome import outcome
from pipeline.runs.tags import Tag
from pipeline.tracking.store import open_client, public_uri, store_exists, store_uri
from pipeline.tracking.tracker import store_of_run

# Suffixes of genotype files. A missing file with one of them is an error and never the name of a run.
GENOTYPE_SUFFIXES = (".json", ".txt", ".py")
_RANDOM = "random:"
_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")


def resolve_run(ref: str, *, runs_dir: Path, tracking_uri: str | None) -> RunDir:
    """Find the run that a reference names.

    Args:
        ref: A run directory or its address, an MLflow run id, or a name: that of a directory in `runs_dir`, or the
            name in a run's record.
        runs_dir: The folder of runs, e.g. `runs`.
        tracking_uri: The MLflow store in which run ids are looked up, see `pipeline.tracking.store.store_uri`.

    Returns:
        A run directory with a record; for a run in a storage, its updated local copy.

    Raises:
        ConfigError: no run or more than one run matches.
    """
    if "://" in ref:
        return _run_at(ref)
    given = RunDir(Path(ref).expanduser())
    if ref and given.exists():
        return given
    bucket.fetch_records(runs_dir)
    runs = list(_runs(runs_dir))
    by_id = is_mlflow_id(ref)
    run = _run_of_mlflow_id(ref, runs, tracking_uri) if by_id else _run_of_name(ref, runs, runs_dir)
    return RunDir(bucket.fetch(bucket.shown(run.path)))


def _run_at(address: str) -> RunDir:
    """Fetch the run at an address."""
    try:
        checked = checked_address(address)
    except ConfigError as error:
        raise error.in_source("run") from None
    run = RunDir(bucket.fetch(checked))
    if not run.exists():
        raise ConfigError("there is no run", field=f"run {address}", remedy="give the address of a run")
    return run


def is_mlflow_id(ref: str) -> bool:
    """Return whether a reference has the form of an MLflow run id.

    Example:
        >>> is_mlflow_id("0123456789abcdef0123456789abcdef"), is_mlflow_id("digits-search")
        (True, False)
    """
    return _MLFLOW_ID.fullmatch(ref) is not None


def resolve_genotype(
    ref: str, *, space: SearchSpace, runs_dir: Path, tracking_uri: str | None
) -> tuple[Genotype, str | None]:
    """Find the genotype that a reference names, and the run that found the genotype.

    Args:
        ref: A file (JSON, or a text form of its space), a published name, "random:SEED", a text form of a space such as
            "nas_bench_201:INDEX", or a RUN as in `resolve_run`.
        space: The space from which a random cell is drawn.
        runs_dir: The folder of runs.
        tracking_uri: The MLflow store in which run ids are looked up.

    Returns:
        The genotype, and the directory of the search that found it, or None. For a sweep, this is the search of its
        best trial. For a file in a run directory, it is the search of that run, if the genotype is the same.

    Raises:
        ConfigError: the reference matches nothing, or a run without a genotype.
        GenotypeError: the file holds no genotype.

    Example:
        >>> from istanas.space import CellSpace
        >>> where = {"runs_dir": Path("runs"), "tracking_uri": None}
        >>> genotype, run = resolve_genotype("ISTA_twostage", space=CellSpace(), **where)
        >>> genotype == PUBLISHED["ISTA_twostage"], run
        (True, None)
    """
    if ref in PUBLISHED:
        return PUBLISHED[ref], None
    if ref.startswith(_RANDOM):
        return random_genotype(_seed(ref), space), None
    written = _written_genotype(ref)
    if written is not None:
        return written, None
    file = Path(ref).expanduser()
    if file.suffix in GENOTYPE_SUFFIXES and "://" not in ref and not file.exists():
        raise ConfigError("no such file", field=f"genotype {ref!r}", remedy="give an existing one")
    ref = _without_file(ref)
    if file.is_file():
        genotype = read_genotype(file)
        return genotype, _writer(file, genotype)
    try:
        run = resolve_run(ref, runs_dir=runs_dir, tracking_uri=tracking_uri)
    except ConfigError as error:
        if is_mlflow_id(ref):
            return _download_genotype(ref, tracking_uri), None
        published = {name.lower(): name for name in PUBLISHED}
        near = difflib.get_close_matches(ref.lower(), published, n=1, cutoff=0.7)
        if near:
            hint = f"did you mean {published[near[0]]}?"
            raise ConfigError("unknown", field=f"genotype {ref!r}", remedy=hint) from None
        hint = f"a genotype may also be a JSON file, {', '.join(PUBLISHED)}, or random:SEED"
        remedy = "; ".join(filter(None, (error.remedy, hint)))
        raise ConfigError(error.problem, field=error.field, remedy=remedy) from None
    found = run.path / GENOTYPE_FILE
    record = run.read()
    if not found.is_file():
        raise ConfigError(
            f"has no {GENOTYPE_FILE} (it is {outcome(record.status, record.tags)})",
            field=f"run {bucket.shown(run.path)}",
            remedy="finish its search first",
        )
    return read_genotype(found), _finder(run)


def _written_genotype(ref: str) -> Genotype | None:
    """Return the genotype that a reference itself describes in the text form of a space, or None."""
    try:
        return parsed_genotype(ref)
    except GenotypeError as error:
        raise GenotypeError(error.problem, field="--genotype", remedy=error.remedy) from None


def _without_file(ref: str) -> str:
    """Remove the genotype file from an address, because runs are fetched as a whole.

    Other references are returned unchanged.

    Example:
        >>> _without_file("s3://bucket/run/best/genotype.json?region=eu"), _without_file("runs/x/genotype.json")
        ('s3://bucket/run?region=eu', 'runs/x/genotype.json')
    """
    address, mark, query = ref.partition("?")
    if "://" not in ref:
        return ref
    return address.removesuffix(f"/{GENOTYPE_FILE}").removesuffix(f"/{BEST_FOLDER}") + mark + query


def origin_of(ref: str) -> str | None:
    """Return the reference if it describes a cell by itself, so that no run has found it; otherwise None.

    Such a reference names a random or published cell, or is the text form of a space.

    Example:
        >>> origin_of("random:0"), origin_of("ISTA_twostage"), origin_of("runs/search")
        ('random:0', 'ISTA_twostage', None)
    """
    written = ref in PUBLISHED or ref.startswith(_RANDOM) or _written_genotype(ref) is not None
    return ref if written else None


def genotype_to_train(ref: str, config: Config) -> tuple[Genotype, str | None]:
    """Find the genotype that a reference names, for a job that trains it with a configuration's `retrain` settings.

    Raises:
        ConfigError: as `resolve_genotype` does; or the genotype comes from a one-stage search and
            `retrain.op_batchnorm` is false, so that the network would differ from the searched one.
        GenotypeError: as `resolve_genotype` does; or the genotype is not one of the configuration's space.
    """
    runs_dir, uri = bucket.local(config.runtime.runs_dir), config.tracking.uri
    genotype, finder = resolve_genotype(ref, space=config.space.build(), runs_dir=runs_dir, tracking_uri=uri)
    check_to_train(ref, genotype, finder, config, tracking_uri=uri)
    return genotype, finder


def check_to_train(
    ref: str, genotype: Genotype, finder: str | None, config: Config, *, tracking_uri: str | None
) -> None:
    """Check that a genotype can be trained with a configuration's `space` and `retrain` settings.

    Args:
        ref: The reference that names the genotype.
        genotype: The genotype.
        finder: The directory of the run that found it, or None.
        config: The configuration.
        tracking_uri: The MLflow store in which run ids are looked up.

    Raises:
        ConfigError, GenotypeError: as `genotype_to_train` does.
    """
    runs_dir = bucket.local(config.runtime.runs_dir)
    try:
        config.space.build().check(genotype)
    except GenotypeError as error:
        raise GenotypeError(error.problem, field=f"genotype {ref}", remedy=error.remedy) from None
    if not config.retrain.op_batchnorm and _from_one_stage(ref, genotype, finder, runs_dir, tracking_uri):
        raise ConfigError(
            f"false, but genotype {ref} comes from a one-stage search, whose network has batch norm after pooling and "
            "identity operations",
            field="retrain.op_batchnorm",
            remedy="set retrain.op_batchnorm=true",
        )


def _from_one_stage(
    ref: str, genotype: Genotype, finder: str | None, runs_dir: Path, tracking_uri: str | None
) -> bool:
    """Return whether a genotype is known to come from a one-stage search.

    The answer comes from the run that found the genotype or, if that run no longer exists, from the reference's run.
    """
    if origin_of(ref) is not None or genotype.digest() == PUBLISHED["ISTA_onestage"].digest():
        return genotype.digest() == PUBLISHED["ISTA_onestage"].digest()
    for run in _runs_of_genotype(ref, finder, runs_dir, tracking_uri):
        if run.exists():
            record = run.read()
            return _is_one_stage(record.kind, record.method, record.params)
    if not is_mlflow_id(ref):
        return False
    data = open_client(store_uri(tracking_uri)).get_run(ref).data
    return _is_one_stage(data.tags.get(Tag.KIND), data.tags.get(Tag.METHOD), data.params)


def _runs_of_genotype(
    ref: str, finder: str | None, runs_dir: Path, tracking_uri: str | None
) -> Iterator[RunDir]:
    """Yield the run that found a genotype, then the run of its reference; either may no longer exist."""
    if finder is not None:
        yield RunDir(bucket.local(finder))
    file = Path(ref).expanduser()
    if file.is_file():
        yield from (RunDir(file.parent), RunDir(file.parent.parent))
        return
    try:
        yield resolve_run(_without_file(ref), runs_dir=runs_dir, tracking_uri=tracking_uri)
    except ConfigError:
        if not is_mlflow_id(ref):  # a run that is only in MLflow has no directory here
            raise


def _is_one_stage(kind: str | None, method: str | None, params: Mapping[str, Any]) -> bool:
    """Return whether a run's cell has the batch norms of a one-stage search; a retraining has a setting for it."""
    if kind == "retrain":
        return str(params.get("retrain.op_batchnorm")) == "True"
    return trains_target(method)


def run_of_config(file: Path) -> RunDir | None:
    """Return the run that wrote a configuration file, in its directory or in the folder `best` of a sweep, or None."""
    folder = file.absolute().parent
    run = RunDir(folder.parent if folder.name == BEST_FOLDER else folder)
    return run if file.name == CONFIG_FILE and run.exists() else None


def load_of_run(file: Path, run: RunDir, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration that a run has written, and update its paths if the project was moved.

    The file has absolute paths of the MLflow store and perhaps of the folder of runs. If these do not exist
    and are not overridden, the current paths are derived from the run directory.

    Args:
        file: The configuration.
        run: The run.
        overrides: See `pipeline.config.load.load`.

    Raises:
        ConfigError: as `pipeline.config.load.load` does.
    """
    try:
        config = load(file, overrides)
    except ConfigError as error:
        raise explain_missing(error, run.environment) from None
    given = {override.partition("=")[0] for override in overrides}
    if not given & {"tracking", "tracking.uri"}:
        tracking = config.tracking.model_copy(update={"uri": store_of_run(run, config.tracking.uri)})
        config = config.model_copy(update={"tracking": tracking})
    runs_dir = config.runtime.runs_dir
    if (
        not given & {"runtime", "runtime.runs_dir"}
        and Path(runs_dir).is_absolute()
        and not Path(runs_dir).exists()
    ):
        runtime = config.runtime.model_copy(update={"runs_dir": str(run.path.absolute().parent)})
        config = config.model_copy(update={"runtime": runtime})
    return config


@dataclass(frozen=True)
class Origin:
    """The run that a genotype comes from, which gives a retraining its settings.

    Args:
        run: The run directory or MLflow run id, as messages show it.
        name: The name of the run without its kind.
        config: The configuration of the run; for a sweep, that of its best trial with all training pictures.
    """

    run: str
    name: str
    config: Config


def resolve_origin(ref: str, *, runs_dir: Path, tracking_uri: str | None) -> Origin | None:
    """Find the run that a genotype comes from; None if it comes from no run.

    Args:
        ref: A reference that `resolve_genotype` resolves.
        runs_dir: The folder of runs.
        tracking_uri: The MLflow store in which run ids are looked up.

    Raises:
        ConfigError: the run's configuration is missing or invalid.
    """
    if origin_of(ref) is not None:
        return None
    file = Path(ref).expanduser()
    if file.is_file():
        if _writer(file, read_genotype(file)) is None:
            return None
        return _origin(RunDir(file.parent if RunDir(file.parent).exists() else file.parent.parent))
    ref = _without_file(ref)
    try:
        run = resolve_run(ref, runs_dir=runs_dir, tracking_uri=tracking_uri)
    except ConfigError:
        if not is_mlflow_id(ref):
            raise
        return _origin_in_mlflow(ref, tracking_uri)
    return _origin(run)


def _config_of(kind: str | None) -> str:
    """Return the configuration file that belongs to the genotype of a run, relative to the run directory."""
    return f"{BEST_FOLDER}/{CONFIG_FILE}" if kind == "sweep" else CONFIG_FILE


def _origin(run: RunDir) -> Origin:
    shown, record = bucket.shown(run.path), run.read()
    file = _config_of(record.kind)
    if not (run.path / file).is_file():
        raise ConfigError(
            f"has no {file}, which says on which pictures to train",
            field=f"run {shown}",
            remedy="give --config",
        )
    config = load_of_run(run.path / file, run)
    uri = config.tracking.uri
    default = store_uri(None)
    # The file contains no password, but the environment may name the same store with a password.
    config = _stored_in(config, None if default != uri == public_uri(default) else uri)
    config = _with_pictures_of(config, [use.source for use in record.datasets])
    return Origin(shown, record.name.removesuffix(f"-{record.kind}"), config)


def _origin_in_mlflow(run_id: str, tracking_uri: str | None) -> Origin:
    client = open_client(store_uri(tracking_uri))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = client.get_run(run_id)
            kind, name = found.data.tags.get(Tag.KIND), found.info.run_name or run_id
            config = load(client.download_artifacts(run_id, _config_of(kind), scratch))
        except ConfigError:
            raise
        except Exception as error:  # for example, a missing file or server
            raise ConfigError(
                f"no {CONFIG_FILE} in the MLflow store, which says on which pictures to train ({one_line(error)})",
                field=f"run {run_id}",
                remedy="give --config",
            ) from None
    inputs = [] if found.inputs is None else found.inputs.dataset_inputs
    sources = [json.loads(each.dataset.source).get("uri", "") for each in inputs]
    config = _with_pictures_of(config, sources)
    # The run may have been tracked on another machine, where the store has another address.
    return Origin(run_id, name.removesuffix(f"-{kind}"), _stored_in(config, tracking_uri))


def _with_pictures_of(config: Config, sources: Sequence[str]) -> Config:
    """Return the configuration with the picture folder that a run has read, if it still exists.

    A relative `data.root` refers to the working directory of the run, which may differ from the current one.

    Args:
        config: The configuration of the run.
        sources: The absolute paths of the picture folders in the run's record.
    """
    root = config.data.root
    if root is None or is_remote(root) or Path(root).expanduser().absolute() in map(Path, sources):
        return config
    there = next((source for source in sources if Path(source).is_dir()), root)
    return config.model_copy(update={"data": config.data.model_copy(update={"root": there})})


def _stored_in(config: Config, tracking_uri: str | None) -> Config:
    tracking = config.tracking.model_copy(update={"uri": tracking_uri})
    return config.model_copy(update={"tracking": tracking})


def _finder(run: RunDir) -> str | None:
    """Return the directory of the run that found the genotype of a run."""
    record = run.read()
    if record.kind == "retrain":  # a retraining of the same genotype belongs to the same search
        return record.parent
    if record.kind == "sweep" and record.result.get("best_run_dir"):
        best = bucket.local(record.result["best_run_dir"])
        bucket.fetch_records(run.path)
        # Run directories may have been moved together.
        trial = next((path for path in (best, run.path / best.name) if RunDir(path).exists()), run.path)
        return bucket.shown(trial)
    return bucket.shown(run.path)


def _writer(file: Path, genotype: Genotype) -> str | None:
    """Return the directory of the run that found a file's genotype, if the file lies in a run directory."""
    for folder in (file.parent, file.parent.parent):
        run, written = RunDir(folder), folder / GENOTYPE_FILE
        try:
            if run.exists() and written.is_file() and read_genotype(written).digest() == genotype.digest():
                return _finder(run)
        except (CheckpointError, GenotypeError):  # the file itself can still be used
            return None
    return None


def _runs(runs_dir: Path) -> Iterator[RunDir]:
    """Yield the runs in a folder and one level below it."""
    for pattern in (f"*/{RECORD_FILE}", f"*/*/{RECORD_FILE}"):
        for file in sorted(runs_dir.glob(pattern)):
            yield RunDir(file.parent)


def _name(run: RunDir) -> str:
    try:
        return run.read().name
    except CheckpointError:  # a broken run must not prevent finding another one
        return run.path.name


def _described(run: RunDir) -> str:
    """Return what tells a run from others of its name: when it was started, and its test accuracy if it has one."""
    try:
        record = run.read()
    except CheckpointError:
        return "its record cannot be read"
    started = f"{datetime.fromtimestamp(record.started_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    top1 = record.result.get("test_top1")
    return f"{started}, test top-1 {percent(top1)}" if isinstance(top1, float) else started


def _run_of_name(ref: str, runs: list[RunDir], runs_dir: Path) -> RunDir:
    found = [run for run in runs if ref in (run.path.name, str(run.path.relative_to(runs_dir)))]
    found = found or [run for run in runs if _name(run) == ref]
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(f"{bucket.shown(run.path)} ({_described(run)})" for run in found)
        raise ConfigError(
            f"means {len(found)} runs", field=f"run {ref!r}", remedy=f"give one of these directories: {paths}"
        )
    is_folder = ref and Path(ref).expanduser().is_dir()
    unknown = f"{f'a folder without {RECORD_FILE}, ' if is_folder else ''}unknown"
    if not runs:
        raise ConfigError(
            f"{unknown}, there are no runs in {bucket.shown(runs_dir)}",
            field=f"run {ref!r}",
            remedy="give a run directory",
        )
    names = {run.path.name for run in runs} | {_name(run) for run in runs}
    near = difflib.get_close_matches(ref, sorted(names), n=3, cutoff=0.4) or sorted(names)[:3]
    raise ConfigError(
        f"{unknown} in {bucket.shown(runs_dir)}",
        field=f"run {ref!r}",
        remedy=f"nearest names: {', '.join(near)}",
    )


def _run_of_mlflow_id(run_id: str, runs: list[RunDir], tracking_uri: str | None) -> RunDir:
    for run in runs:
        link = read_link(run)
        if link is not None and link.run_id == run_id:
            return run
    uri = store_uri(tracking_uri)
    unknown = f"no such run in the MLflow store {public_uri(uri)}"
    if not store_exists(uri):
        raise ConfigError(
            f"{unknown}, which does not exist",
            field=f"run {run_id}",
            remedy="set MLFLOW_TRACKING_URI or give a run directory",
        )
    try:
        tags = open_client(uri).get_run(run_id).data.tags
    except Exception as error:  # stores raise many types of errors for a missing run or server
        raise ConfigError(
            f"{unknown} ({one_line(error)})",
            field=f"run {run_id}",
            remedy="check the id or give a run directory",
        ) from None
    address = tags.get(Tag.RUN_DIR, "")
    run = RunDir(bucket.fetch(address))
    if not tags.get(Tag.RUN_DIR) or not run.exists() or run.read().key != tags.get(Tag.KEY):
        raise ConfigError(
            f"its run directory {address} is not here",
            field=f"run {run_id}",
            remedy="copy it and give its path",
        )
    return run


def _download_genotype(run_id: str, tracking_uri: str | None) -> Genotype:
    uri = store_uri(tracking_uri)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise ConfigError(
            f"the MLflow store {public_uri(uri)} does not exist",
            field=f"run {run_id}",
            remedy="set MLFLOW_TRACKING_URI",
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = open_client(uri).download_artifacts(run_id, GENOTYPE_FILE, scratch)
        except Exception as error:  # for example, a missing run, file or server
            raise ConfigError(
                f"no {GENOTYPE_FILE} in the MLflow store {public_uri(uri)} ({one_line(error)})",
                field=f"run {run_id}",
                remedy="check the id or give a genotype file",
            ) from None
        return read_genotype(Path(path))


def _seed(ref: str) -> int:
    text = ref.removeprefix(_RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigError(
            "not random:SEED",
            field=f"genotype {ref!r}",
            remedy="give a whole number from 0, as in random:0",
        )
    return int(text)
