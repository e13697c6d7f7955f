"""What a user may write where the command line wants a RUN or a genotype, and what it stands for.

A RUN is a run directory, an MLflow run id, or a unique name. Local files are asked first, so that a finished
run is found without MLflow.
"""

import difflib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from istanas.errors import CheckpointError, ConfigError, GenotypeError
from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype
from pipeline.base.addresses import checked_address, sqlite_file
from pipeline.base.redaction import without_secrets
from pipeline.base.text import one_line
from pipeline.config.load import load
from pipeline.config.schema import NEEDS_OP_BATCHNORM, Config
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import read_genotype
from pipeline.runs.layout import BEST_FOLDER, CONFIG_FILE, GENOTYPE_FILE, RECORD_FILE
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.outcome import outcome
from pipeline.tracking.store import open_client, public_uri, store_exists, store_uri
from pipeline.tracking.tracker import store_of_run

GENOTYPE_SUFFIXES = (
    ".json",
    ".txt",
    ".py",
)  # of files with a genotype; a missing one is not looked for as a run
_RANDOM = "random:"
_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")


def resolve_run(ref: str, *, runs_dir: Path, tracking_uri: str | None) -> RunDir:
    """The run that a reference names.

    Args:
        ref: a run directory or its address, an MLflow run id, or a name: of a directory in `runs_dir`, or of a
            run's record.
        runs_dir: where runs are kept, e.g. `runs`.
        tracking_uri: the MLflow store to ask for a run id, see `pipeline.tracking.store.store_uri`.

    Returns:
        A run directory with a record; of one that lies in a storage a copy that is up to date.

    Raises:
        ConfigError: nothing, or more than one run, is meant.
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
    """The run at an address; without the file in it that may be named."""
    try:
        run = RunDir(bucket.fetch(checked_address(address)))
    except ValueError as error:
        raise ConfigError(f"run {without_secrets(address)}: {error}") from None
    if not run.exists():
        raise ConfigError(f"run {address}: there is no run, give the address of one")
    return run


def is_mlflow_id(ref: str) -> bool:
    """Whether a reference has the form of an MLflow run id.

    Example:
        >>> is_mlflow_id("0123456789abcdef0123456789abcdef"), is_mlflow_id("digits-search")
        (True, False)
    """
    return _MLFLOW_ID.fullmatch(ref) is not None


def resolve_genotype(
    ref: str, *, space: CellSpace, runs_dir: Path, tracking_uri: str | None
) -> tuple[Genotype, str | None]:
    """The genotype that a reference names, and the directory of the run that found it.

    Args:
        ref: a file (JSON, or the text form of DARTS), a published name, "random:SEED", or a RUN as in `resolve_run`.
        space: the space that a random cell is drawn from.
        runs_dir: where runs are kept.
        tracking_uri: the MLflow store to ask for a run id.

    Returns:
        (genotype, directory of the run that found it or None): a search, of a sweep that of its best trial. A file
        is traced too, if it still is the one that its run has written.

    Raises:
        ConfigError: the reference names nothing, or a run that has no genotype yet.
        GenotypeError: the file holds no genotype.

    Example:
        >>> where = {"runs_dir": Path("runs"), "tracking_uri": None}
        >>> genotype, run = resolve_genotype("ISTA_twostage", space=CellSpace(), **where)
        >>> genotype == PUBLISHED["ISTA_twostage"], run
        (True, None)
    """
    if ref in PUBLISHED:
        return PUBLISHED[ref], None
    if ref.startswith(_RANDOM):
        return random_genotype(_seed(ref), space), None
    file = Path(ref).expanduser()
    if file.suffix in GENOTYPE_SUFFIXES and "://" not in ref and not file.exists():
        raise ConfigError(f"genotype {ref!r}: no such file; give an existing one")
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
            raise ConfigError(f"genotype {ref!r}: unknown, did you mean {published[near[0]]}?") from None
        hint = f"a genotype may also be a JSON file, {', '.join(PUBLISHED)}, or random:SEED"
        raise ConfigError(f"{error}; {hint}") from None
    found = run.path / GENOTYPE_FILE
    record = run.read()
    if not found.is_file():
        raise ConfigError(
            f"run {bucket.shown(run.path)}: has no {GENOTYPE_FILE} (it is {outcome(record.status, record.tags)}); "
            "finish its search first"
        )
    return read_genotype(found), _finder(run)


def _without_file(ref: str) -> str:
    """Return the address of the run whose genotype file is named, because a run is fetched as a whole.

    A sweep has the genotype of its best trial twice. Every other reference is returned as it is.

    Example:
        >>> _without_file("s3://bucket/run/best/genotype.json?region=eu"), _without_file("runs/x/genotype.json")
        ('s3://bucket/run?region=eu', 'runs/x/genotype.json')
    """
    address, mark, query = ref.partition("?")
    if "://" not in ref:
        return ref
    return address.removesuffix(f"/{GENOTYPE_FILE}").removesuffix(f"/{BEST_FOLDER}") + mark + query


def origin_of(ref: str) -> str | None:
    """The reference of a genotype that no run has found: a random or a published cell; else None.

    Example:
        >>> origin_of("random:0"), origin_of("ISTA_twostage"), origin_of("runs/search")
        ('random:0', 'ISTA_twostage', None)
    """
    return ref if ref in PUBLISHED or ref.startswith(_RANDOM) else None


def genotype_to_train(ref: str, config: Config) -> tuple[Genotype, str | None]:
    """`resolve_genotype` for a job that trains the genotype's network under a configuration's `retrain` settings.

    Raises:
        ConfigError: as `resolve_genotype`; or if the genotype comes from a one-stage search and `retrain.op_batchnorm`
            is false, which would build another network than the one that was searched.
    """
    runs_dir, tracking_uri = bucket.local(config.runtime.runs_dir), config.tracking.uri
    space = config.space.cell_space()
    genotype, finder = resolve_genotype(ref, space=space, runs_dir=runs_dir, tracking_uri=tracking_uri)
    if not config.retrain.op_batchnorm and _from_one_stage(ref, genotype, finder, runs_dir, tracking_uri):
        raise ConfigError(f"genotype {ref}: {NEEDS_OP_BATCHNORM}")
    return genotype, finder


def _from_one_stage(
    ref: str, genotype: Genotype, finder: str | None, runs_dir: Path, tracking_uri: str | None
) -> bool:
    """Whether a genotype comes from a one-stage search, as far as its reference tells.

    The run that found it is asked first, then the run that is named, in its directory or in MLflow.
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
    return _is_one_stage(data.tags.get("istanas.kind"), data.tags.get("istanas.method"), data.params)


def _runs_of_genotype(
    ref: str, finder: str | None, runs_dir: Path, tracking_uri: str | None
) -> Iterator[RunDir]:
    """The run that found a genotype, then the one that is named; they may be gone."""
    if finder is not None:
        yield RunDir(bucket.local(finder))
    file = Path(ref).expanduser()
    if file.is_file():
        yield from (RunDir(file.parent), RunDir(file.parent.parent))
        return
    try:
        yield resolve_run(_without_file(ref), runs_dir=runs_dir, tracking_uri=tracking_uri)
    except ConfigError:
        if not is_mlflow_id(ref):  # else its directory is not here, and MLflow knows it
            raise


def _is_one_stage(kind: str | None, method: str | None, params: Mapping[str, Any]) -> bool:
    """Whether the cell of a run has the batch norms of a one-stage search; a retraining tells it by its own network."""
    if kind == "retrain":
        return str(params.get("retrain.op_batchnorm")) == "True"
    return method == "one_stage"


def run_of_config(file: Path) -> RunDir | None:
    """The run whose own configuration a file is, or, in the folder `best`, that of a sweep's best trial; else None."""
    folder = file.absolute().parent
    run = RunDir(folder.parent if folder.name == BEST_FOLDER else folder)
    return run if file.name == CONFIG_FILE and run.exists() else None


def load_of_run(file: Path, run: RunDir, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration that a run has written; places in it that are gone are looked for where the run is now.

    It names the MLflow store, and perhaps the runs' folder, absolutely. If the project was moved, these are found by
    the run directory, unless they are overridden.

    Args:
        file: the configuration.
        run: the run.
        overrides: as `pipeline.config.load.load` takes them.

    Raises:
        ConfigError: as `pipeline.config.load.load`.
    """
    config, given = load(file, overrides), {override.partition("=")[0] for override in overrides}
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
    """The run that a genotype comes from, as a retraining takes settings from it.

    Args:
        run: its directory or MLflow run id, for people.
        name: of the run, without what kind of run it is.
        config: its configuration; of a sweep, that of its best trial with all training pictures.
    """

    run: str
    name: str
    config: Config


def resolve_origin(ref: str, *, runs_dir: Path, tracking_uri: str | None) -> Origin | None:
    """The run that a genotype comes from; None if it comes from none.

    Args:
        ref: as `resolve_genotype` takes it, which has found something.
        runs_dir: where runs are kept.
        tracking_uri: the MLflow store to ask for a run id.

    Raises:
        ConfigError: the run has no configuration any more, or one that cannot be read.
    """
    if ref in PUBLISHED or ref.startswith(_RANDOM):
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
    """Return the file of a run that holds the settings of its genotype, relative to the run."""
    return f"{BEST_FOLDER}/{CONFIG_FILE}" if kind == "sweep" else CONFIG_FILE


def _origin(run: RunDir) -> Origin:
    shown, record = bucket.shown(run.path), run.read()
    file = _config_of(record.kind)
    if not (run.path / file).is_file():
        raise ConfigError(f"run {shown}: has no {file}, which says on which pictures to train: give --config")
    config = load_of_run(run.path / file, run)
    uri = config.tracking.uri
    default = store_uri(None)
    # A run's file holds no password; the environment may name the same store with one.
    config = _stored_in(config, None if default != uri == public_uri(default) else uri)
    config = _with_pictures_of(config, [use.source for use in record.datasets])
    return Origin(shown, record.name.removesuffix(f"-{record.kind}"), config)


def _origin_in_mlflow(run_id: str, tracking_uri: str | None) -> Origin:
    client = open_client(store_uri(tracking_uri))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = client.get_run(run_id)
            kind, name = found.data.tags.get("istanas.kind"), found.info.run_name or run_id
            config = load(client.download_artifacts(run_id, _config_of(kind), scratch))
        except ConfigError:
            raise
        except Exception as error:  # no such file, no such server
            raise ConfigError(
                f"run {run_id}: no {CONFIG_FILE} in the MLflow store, which says on which pictures to train "
                f"({one_line(error)}): give --config"
            ) from None
    inputs = [] if found.inputs is None else found.inputs.dataset_inputs
    sources = [json.loads(each.dataset.source).get("uri", "") for each in inputs]
    config = _with_pictures_of(config, sources)
    # The store that has the run, by the name that it has here: the run was tracked on another machine.
    return Origin(run_id, name.removesuffix(f"-{kind}"), _stored_in(config, tracking_uri))


def _with_pictures_of(config: Config, sources: Sequence[str]) -> Config:
    """Return the configuration with the folder that a run has read, if it still exists.

    A relative `data.root` starts at the working directory of the run, which may be another one than today's.

    Args:
        config: of the run.
        sources: where the run has recorded that its pictures come from, as absolute paths.
    """
    root = config.data.root
    if root is None or Path(root).expanduser().absolute() in map(Path, sources):
        return config
    there = next((source for source in sources if Path(source).is_dir()), root)
    return config.model_copy(update={"data": config.data.model_copy(update={"root": there})})


def _stored_in(config: Config, tracking_uri: str | None) -> Config:
    tracking = config.tracking.model_copy(update={"uri": tracking_uri})
    return config.model_copy(update={"tracking": tracking})


def _finder(run: RunDir) -> str | None:
    """The directory of the run that found a run's genotype."""
    record = run.read()
    if record.kind == "retrain":  # what is retrained once more belongs to the same search
        return record.parent
    if record.kind == "sweep" and record.result.get("best_run_dir"):
        best = bucket.local(record.result["best_run_dir"])
        bucket.fetch_records(run.path)
        # Run directories may have been moved together.
        trial = next((path for path in (best, run.path / best.name) if RunDir(path).exists()), run.path)
        return bucket.shown(trial)
    return bucket.shown(run.path)


def _writer(file: Path, genotype: Genotype) -> str | None:
    """The directory of the run that found a file's genotype, if the file lies in a run, or in a sweep's `best`."""
    for folder in (file.parent, file.parent.parent):
        run, written = RunDir(folder), folder / GENOTYPE_FILE
        try:
            if run.exists() and written.is_file() and read_genotype(written).digest() == genotype.digest():
                return _finder(run)
        except (CheckpointError, GenotypeError):  # a file is as good as its own content
            return None
    return None


def _runs(runs_dir: Path) -> Iterator[RunDir]:
    """The runs kept in a folder, directly or one folder down."""
    for pattern in (f"*/{RECORD_FILE}", f"*/*/{RECORD_FILE}"):
        for file in sorted(runs_dir.glob(pattern)):
            yield RunDir(file.parent)


def _name(run: RunDir) -> str:
    try:
        return run.read().name
    except CheckpointError:  # a broken neighbour must not stand in the way of the run that is meant
        return run.path.name


def _run_of_name(ref: str, runs: list[RunDir], runs_dir: Path) -> RunDir:
    found = [run for run in runs if ref in (run.path.name, str(run.path.relative_to(runs_dir)))]
    found = found or [run for run in runs if _name(run) == ref]
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(bucket.shown(run.path) for run in found)
        raise ConfigError(f"run {ref!r}: means {len(found)} runs; give one of these directories: {paths}")
    is_folder = ref and Path(ref).expanduser().is_dir()
    unknown = f"run {ref!r}: {f'a folder without {RECORD_FILE}, ' if is_folder else ''}unknown"
    if not runs:
        raise ConfigError(f"{unknown}, there are no runs in {bucket.shown(runs_dir)}; give a run directory")
    names = {run.path.name for run in runs} | {_name(run) for run in runs}
    near = difflib.get_close_matches(ref, sorted(names), n=3, cutoff=0.4) or sorted(names)[:3]
    raise ConfigError(f"{unknown} in {bucket.shown(runs_dir)}; nearest names: {', '.join(near)}")


def _run_of_mlflow_id(run_id: str, runs: list[RunDir], tracking_uri: str | None) -> RunDir:
    for run in runs:
        link = read_link(run)
        if link is not None and link.run_id == run_id:
            return run
    uri = store_uri(tracking_uri)
    unknown = f"run {run_id}: no such run in the MLflow store {public_uri(uri)}"
    if not store_exists(uri):
        raise ConfigError(f"{unknown}, which does not exist; set MLFLOW_TRACKING_URI or give a run directory")
    try:
        tags = open_client(uri).get_run(run_id).data.tags
    except Exception as error:  # no such run or no such server, each store in its own words
        raise ConfigError(f"{unknown} ({one_line(error)}); check the id or give a run directory") from None
    address = tags.get("istanas.run_dir", "")
    run = RunDir(bucket.fetch(address))
    if not tags.get("istanas.run_dir") or not run.exists() or run.read().key != tags.get("istanas.key"):
        raise ConfigError(f"run {run_id}: its run directory {address} is not here; copy it and give its path")
    return run


def _download_genotype(run_id: str, tracking_uri: str | None) -> Genotype:
    uri = store_uri(tracking_uri)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise ConfigError(
            f"run {run_id}: the MLflow store {public_uri(uri)} does not exist; set MLFLOW_TRACKING_URI"
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = open_client(uri).download_artifacts(run_id, GENOTYPE_FILE, scratch)
        except Exception as error:  # no such run, no such file, no such server
            raise ConfigError(
                f"run {run_id}: no {GENOTYPE_FILE} in the MLflow store {public_uri(uri)} "
                f"({one_line(error)}); check the id or give a genotype file"
            ) from None
        return read_genotype(Path(path))


def _seed(ref: str) -> int:
    text = ref.removeprefix(_RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigError(f"genotype {ref!r}: not random:SEED; give a whole number from 0, as in random:0")
    return int(text)
