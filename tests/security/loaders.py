"""The fuzzed loaders: for each one, nearly valid inputs and the first message that invalid inputs may have.

Most inputs are valid ones with a few changes of values or bytes, since random bytes would never pass the first check.
"""

import hashlib
import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image

from istanas.data.shard_files import FolderShards
from istanas.data.shard_index import INDEX_FILE, read_index
from istanas.data.shard_scan import index_shards, scan_shard
from istanas.errors import IstanasError
from istanas.space import PUBLISHED, Genotype
from istanas.space.nas_bench_201 import genotype_at
from pipeline.config import load as config
from pipeline.runs import checkpoint
from pipeline.runs.directory import RunDir
from pipeline.runs.epoch_log import BrokenCheckpointWarning, LogEnd
from pipeline.runs.layout import EPOCH_LOGS
from pipeline.sweeps import space as sweep_space
from pipeline.training.epoch_record import Progress, load_latest, load_progress, read_records
from pipeline.training.latency_tables import read_table
from tests.pipeline.training.made_up import as_version_0_1, record_of

# ---------- junk
_NUMBERS = [
    *range(-2, 12),
    *(2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
]
_TEXTS = [
    *(
        "",
        "skip_connect",
        "sep_conv_3x3",
        "digits",
        "two_stage",
        "1e999",
        "~",
        "0x1",
        "1_0",
        "on",
        "a.b",
        "epochs",
    ),
    *(
        "\x00",
        "\x1b[2J\n",
        "\ud800",
        "\u2028",
        "é" * 50,
        "../..",
        "s3://a",
        "://:@",
        "!!python/none",
        "&a",
        "*a",
    ),
]


def scalar(random: Random) -> Any:
    how = random.random()
    if how < 0.15:
        return random.choice([None, True, False])
    if how < 0.6:
        return random.choice(_NUMBERS)
    return text(random)


def text(random: Random) -> str:
    if random.random() < 0.7:
        return random.choice(_TEXTS)
    return "".join(
        chr(random.choice([random.randrange(128), random.randrange(0x3000)]))
        for _ in range(random.randrange(6))
    )


def junk(random: Random, depth: int = 0) -> Any:
    """Return a value of any kind, with up to three levels."""
    if depth == 3 or random.random() < 0.6:
        return scalar(random)
    inner = [junk(random, depth + 1) for _ in range(random.randrange(4))]
    return inner if random.random() < 0.5 else {text(random): value for value in inner}


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values of a tree."""
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def changed(random: Random, tree: Any) -> Any:
    """Return a tree with up to three values replaced, left out, duplicated or added."""
    tree = copied(tree)
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        path = random.choice(list(places(tree)))
        if not path:
            continue
        holder, key = at(tree, path[:-1]), path[-1]
        how = random.choice(["replace", "scalar", "swap", "delete", "double", "add"])
        if how == "replace":
            holder[key] = junk(random)
        elif how == "scalar":
            holder[key] = scalar(random)
        elif how == "swap":  # with another value of the tree
            holder[key] = copied(at(tree, random.choice(list(places(tree)))))
        elif how == "delete":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copied(holder[key]) if how == "double" else junk(random))
        else:
            holder[text(random)] = copied(holder[key]) if how == "double" else junk(random)
    return tree


def damaged(random: Random, content: bytes) -> bytes:
    """Return bytes with some of them flipped, truncated, left out, duplicated or added."""
    data = bytearray(content)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(data) or 1)
        how = random.choice(["flip", "flip", "byte", "byte", "cut", "out", "double", "insert"])
        if how == "flip" and data:
            data[place] ^= 1 << random.randrange(8)
        elif how == "byte" and data:
            data[place] = random.choice(b'\x00\xff{}[]",:&*!|>-0 9eE.\n\t')
        elif how == "cut":
            del data[place:]
        elif how == "out":
            del data[place : place + random.randint(1, 20)]
        elif how == "double":
            data[place:place] = data[place : place + random.randint(1, 40)]
        else:
            data[place:place] = random.randbytes(random.randrange(6))
    return bytes(data)


def mixed(random: Random, trees: Sequence[Any], write: Callable[[Any], bytes]) -> bytes:
    """Return a tree with changed values or, less often, with changed bytes, or random values or bytes."""
    how = random.random()
    if how < 0.05:
        return random.randbytes(random.randrange(60))
    if how < 0.1:
        return write(junk(random))
    written = write(changed(random, random.choice(trees)))
    return damaged(random, written) if how < 0.3 else written


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---------- the loaders
@dataclass(frozen=True)
class Loader:
    """A loader and its inputs.

    Args:
        name: Its name in reports.
        make: Makes an input of bytes, or of several of them.
        load: Gives an input to the loader, which must raise an `IstanasError` to refuse it, and nothing else.
        first_check: The beginnings of messages about an input's format.
    """

    name: str
    make: Callable[[Random], Any]
    load: Callable[[Path, Any], None]
    first_check: tuple[str, ...]


def _genotype(folder: Path, data: bytes) -> None:
    genotype = Genotype.from_json(data)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert len(genotype.digest()) == 64
    str(genotype)


def _config(folder: Path, data: tuple[bytes, list[str]]) -> None:
    text, overrides = data
    file = folder / "fuzz.yaml"
    file.write_bytes(text)
    loaded = config.load(file, overrides)
    if loaded.seed % 5 == 0:  # this takes ten times as long as the rest
        file.write_text(config.to_yaml(loaded))
        assert config.load(file) == loaded


def _sweep(folder: Path, data: bytes) -> None:
    file = folder / "fuzz.yaml"
    file.write_bytes(data)
    sweep_space.check_space(config.load(file))


def _checkpoint(folder: Path, data: tuple[bytes, bytes | None]) -> None:
    content, manifest = data
    (folder / "epoch-0001.pt").write_bytes(content)
    if manifest is None:
        manifest = as_json({"sha256": hashlib.sha256(content).hexdigest()})
    (folder / "epoch-0001.json").write_bytes(manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenCheckpointWarning)
        passed_over = load_latest(folder) is None
        if not passed_over:
            load_progress(folder)
    state = checkpoint.deserialize(content)  # the same errors, except wrong checksums
    assert isinstance(state, dict)
    if passed_over:
        raise IstanasError("its checksum does not match")


def _log(folder: Path, copies: tuple[bytes, bytes]) -> None:
    for name, data in zip(EPOCH_LOGS, copies, strict=True):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "000001.jsonl").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenCheckpointWarning)
        assert list(read_records(folder, _LOGGED)) == _RECORDS, "a record was changed, and accepted"


def _latency_table(folder: Path, data: bytes) -> None:
    file = folder / "fuzz.json"
    file.write_bytes(data)
    for each in read_table(file).candidates:
        assert each.median_ms >= 0


def _metrics(folder: Path, data: tuple[bytes, bytes, bytes]) -> None:
    record, lines, environment = data
    run = RunDir(folder)
    for name, content in (("run.json", record), ("metrics.jsonl", lines), ("environment.json", environment)):
        (folder / name).write_bytes(content)
    refused = []
    for read in (run.read, run.metrics, run.environment):
        try:
            read()
        except IstanasError as error:
            refused.append(error)
    if refused:
        raise refused[-1]


def _shard(folder: Path, data: bytes) -> None:
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "a.tar").write_bytes(data)
    shard, table, _ = scan_shard(folder, "train/a.tar")
    assert len(table) == shard.samples > 0


def _index(folder: Path, data: bytes) -> None:
    for name, content in _SHARDS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / INDEX_FILE).write_bytes(data)
    index = read_index(FolderShards(str(folder)))
    assert len(index.names("").short(range(len(index.samples)))) == len(index.samples)


def _zipped(pickle: bytes) -> bytes:
    """Return a checkpoint with this pickle and valid checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_SAVED)) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for member in whole.infolist():
            archive.writestr(
                member.filename, pickle if member.filename.endswith("data.pkl") else whole.read(member)
            )
    return buffer.getvalue()


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _saved(state: Any) -> bytes:
    return checkpoint.serialize(state)


_STATE = {
    "net": {"w": torch.arange(4.0), "n": torch.tensor(3), "h": torch.zeros(2, 2, dtype=torch.float16)},
    "data": "0123",
}
_RECORDS = [record_of(epoch) for epoch in (1, 2, 3)]


def _logged() -> tuple[Progress, bytes]:
    progress, log = Progress(), b""
    for record in _RECORDS:
        progress, line = progress.after(record)
        log += line
    return progress, log


_LOGGED, _LOG = _logged()
_SAVED = _saved({**_STATE, "progress": _LOGGED.to_state()})
_OLD_HISTORY = [as_version_0_1(record) for record in _RECORDS]
_GENOTYPES = [genotype.to_dict() for genotype in (*PUBLISHED.values(), genotype_at(123))] + [
    Genotype(normal=((("skip_connect", 0),),), reduce=((("max_pool_3x3", 1),),)).to_dict()
]
_CONFIGS: list[Any] = [
    {
        "seed": 1,
        "data": {"holdout": 0.1},
        "space": {"nodes": 2, "ops": ["skip_connect", "sep_conv_3x3"], "sparsity": 1},
    },
    {
        "method": "one_stage",
        "search": {"train_epochs": 2, "lr": 0.1},
        "runtime": {"workers": "1:2", "threads": 1},
    },
    {
        "search": {"epochs": 2, "termination_tol": None},
        "retrain": {"epochs": 3, "stem": "cifar"},
        "tracking": {"name": "a"},
    },
    {},
]
_SWEEPS: list[Any] = [
    {
        "data": {"holdout": 0.1},
        "sweep": {
            "trials": 2,
            "space": {"search.lr": {"loguniform": [0.01, 0.2]}, "space.nodes": {"int": [1, 3]}},
        },
    },
    {
        "sweep": {
            "space": {
                "method": {"choice": ["two_stage", "one_stage"]},
                "search.epochs": {"int": [1, 2], "when": {"method": "two_stage"}},
            },
            "points": [{"method": "one_stage"}],
        },
        "data": {"holdout": 0.1},
    },
    {
        "sweep": {
            "objective": "searched",
            "space": {
                "search.stem": {"fixed": "cifar"},
                "search.arch_betas": {"choice": [[0.5, 0.9], [0.1, 0.2]]},
            },
        }
    },
]
_RECORD = {
    "name": "a",
    "kind": "search",
    "method": "two_stage",
    "dataset": "digits",
    "key": "0",
    "params": {"seed": 1, "lr": 0.5, "n": None},
    "tags": {"a": "b"},
    "description": "",
    "parent": None,
    "status": "RUNNING",
    "started_ms": 1,
    "ended_ms": None,
    "artifacts": ["config.yaml"],
    "result": {"seconds": 1.5},
    "datasets": [
        {
            "name": "digits",
            "context": "test",
            "digest": "0",
            "source": "",
            "pictures": 1,
            "classes": 2,
            "shape": [1, 8, 8],
        }
    ],
}
_LATENCY = {"median_ms": 0.5, "lower_ms": 0.25, "upper_ms": 1.0}
_TABLE = {
    "machine": {
        "backend": "torch",
        "device": "cpu",
        "device_name": "a processor",
        "threads": 1,
        "dtype": "float32",
        "versions": {"torch": "2"},
    },
    "space": {"name": "darts", "n_nodes": 1, "ops": ["skip_connect"]},
    "network": {"init_channels": 4, "layers": 3, "num_classes": 10},
    "picture": [3, 8, 8],
    "batch_size": 1,
    "runs": 30,
    "fixed_ms": 1.5,
    "scale": 1.0,
    "candidates": [
        {**_LATENCY, "operation": "skip_connect", "input": [4, 8, 8], "output": [4, 8, 8], "params": 0}
    ],
    "references": [{**_LATENCY, "seed": 3}],
}
_LINE = {"step": 1, "timestamp_ms": 1000, "metrics": {"train/loss": 1.5, "valid/top1": 0.25}}


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


_PICTURE = _picture()
_MEMBERS: list[Any] = [
    ["0.png", None],
    ["0.cls", "0"],
    ["1.png", None],
    ["1.json", '{"label": 1, "class": "cat", "file": "a.png"}'],
]


def _tar_of(members: Any) -> bytes:
    """Return a tar file with members (name, text; None: a picture); values of other kinds are left out."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, errors="surrogatepass") as tar:
        for member in members if isinstance(members, list) else []:
            if isinstance(member, list) and len(member) == 2 and isinstance(member[0], str):
                name, said = member
                content = _PICTURE if said is None else str(said).encode(errors="surrogatepass")
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _indexed() -> tuple[bytes, dict[str, bytes]]:
    """Return an index and its shards."""
    shards = {f"{split}/a.tar": _tar_of(_MEMBERS) for split in ("train", "test")}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in shards.items():
            Path(folder, name).parent.mkdir()
            Path(folder, name).write_bytes(content)
        index_shards(Path(folder), processes=1)
        return Path(folder, INDEX_FILE).read_bytes(), shards


_INDEX, _SHARDS = _indexed()
_TABLE_OF_PICTURES = pq.read_table(io.BytesIO(_INDEX))
_DESCRIPTION = json.loads(_TABLE_OF_PICTURES.schema.metadata[b"istanas"])


_KEYS = (
    "seed",
    "search.epochs",
    "space.ops",
    "runtime.address",
    "data.root",
    "sweep.trials",
    "search",
    "a.b",
    "seed.x",
)


# ---------- their inputs
def _genotype_input(random: Random) -> bytes:
    return mixed(random, _GENOTYPES, as_json)


def _config_input(random: Random) -> tuple[bytes, list[str]]:
    overrides = []
    if random.random() < 0.4:
        key = random.choice(_KEYS) if random.random() < 0.8 else text(random)
        value = json.dumps(junk(random)) if random.random() < 0.7 else text(random)
        overrides = [f"{key}={value}"]
    return mixed(random, _CONFIGS, as_json), overrides


def _sweep_input(random: Random) -> bytes:
    return mixed(random, _SWEEPS, as_json)


def _checkpoint_input(random: Random) -> tuple[bytes, bytes | None]:
    """Return a checkpoint and its manifest; None: a valid manifest."""
    how = random.random()
    if how < 0.4:
        progress: Any = {"progress": _LOGGED.to_state()}
        if how < 0.2:
            progress = {"history": _OLD_HISTORY}
        content = _saved(changed(random, {**_STATE, **progress}))
    elif how < 0.8:
        content = _zipped(damaged(random, _pickle_of(_SAVED)))
    else:
        content = damaged(random, _SAVED) if how < 0.95 else random.randbytes(random.randrange(60))
    return content, mixed(random, [{"sha256": "0"}], as_json) if random.random() < 0.2 else None


def _log_input(random: Random) -> tuple[bytes, bytes]:
    """Return two copies of a log, of which one is mostly whole."""
    other = _LOG if random.random() < 0.3 else b""
    if random.random() < 0.5:
        return damaged(random, _LOG), other
    lines = [mixed(random, [json.loads(record.to_json())], as_json) for record in _RECORDS]
    end, log = LogEnd(), b""
    for line in lines:  # with valid checksums
        end, whole = end.after(line.decode(errors="replace").replace("\n", " "))
        log += whole
    return log, other


def _metrics_input(random: Random) -> tuple[bytes, bytes, bytes]:
    lines = [
        mixed(random, [_LINE], as_json) if random.random() < 0.4 else as_json(_LINE)
        for _ in range(random.randrange(4))
    ]
    record = mixed(random, [_RECORD], as_json) if random.random() < 0.8 else as_json(_RECORD)
    environment = mixed(random, [{"ray": "2", "command": []}], as_json) if random.random() < 0.2 else b"{}"
    return record, b"".join(line.replace(b"\n", b" ") + b"\n" for line in lines), environment


def _shard_input(random: Random) -> bytes:
    if random.random() < 0.2:
        return damaged(random, _tar_of(_MEMBERS))
    members = copied(_MEMBERS)
    name, said = random.randrange(len(members)), random.choice([1, 3])
    if random.random() < 0.3:
        members[name][0] = text(random) + random.choice(["", ".png", ".cls"])
    if random.random() < 0.5:
        members[said][1] = mixed(random, [{"label": 1, "class": "cat"}], as_json).decode(errors="replace")
    return _tar_of(changed(random, members) if random.random() < 0.3 else members)


def _index_input(random: Random) -> bytes:
    if random.random() < 0.2:
        return damaged(random, _INDEX)
    table, description = _TABLE_OF_PICTURES, as_json(_DESCRIPTION)
    if random.random() < 0.4:
        place = random.randrange(table.num_columns)
        values: Any = [random.choice([0, 1, -1, 2**31 - 1, 2**62, None, 0.5])] * len(table)
        if random.random() < 0.2:
            values = [text(random).replace("\ud800", "")] * len(table)
        table = table.set_column(place, table.column_names[place], [values])
    if random.random() < 0.6:
        description = mixed(random, [_DESCRIPTION], as_json)
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"istanas": description}), stream)
    return stream.getvalue()


LOADERS = (
    Loader("genotype", _genotype_input, _genotype, ("genotype: not JSON",)),
    Loader("configuration", _config_input, _config, ("fuzz.yaml: not valid YAML",)),
    Loader(
        "checkpoint",
        _checkpoint_input,
        _checkpoint,
        ("no checkpoint (File is not a zip file", "no checkpoint (Bad"),
    ),
    Loader("sweep", _sweep_input, _sweep, ("fuzz.yaml: not valid YAML",)),
    Loader("log", _log_input, _log, ("epochs/000001.jsonl is damaged (it ends",)),
    Loader(
        "latency table",
        lambda random: mixed(random, [_TABLE], as_json),
        _latency_table,
        ("search.latency_table: fuzz.json is not a table of latencies (Invalid JSON",),
    ),
    Loader("shard", _shard_input, _shard, ("data.root: train/a.tar: it is truncated or damaged",)),
    Loader(
        "index of shards",
        _index_input,
        _index,
        tuple(
            f"data.root: index.parquet is not an index of shards ({reason}"
            for reason in (
                "Parquet",
                "Couldn't deserialize",
                "'utf-8'",
                "Expecting",
                "Unterminated",
                "Invalid",
            )
        ),
    ),
    Loader("metrics", _metrics_input, _metrics, ("run.json: not JSON", "environment.json: not JSON")),
)


@contextmanager
def few_random_settings() -> Iterator[None]:
    """Check a sweep's space with two random settings instead of a hundred."""
    before, sweep_space.N_CHECKED = sweep_space.N_CHECKED, 2
    try:
        yield
    finally:
        sweep_space.N_CHECKED = before


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, in memory if possible."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
