"""Hostile files at every command that reads them: a one-line error, little memory and time, and no code is run."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# The commands import these, once for all cases.
import pipeline.jobs.compare
import pipeline.jobs.export
import pipeline.jobs.retrain
import pipeline.jobs.search
import pipeline.tracking.promote  # noqa: F401
from istanas.limits import GENOTYPE_BYTES
from istanas.space import PUBLISHED
from pipeline.cli import commands as cli
from pipeline.runs.checkpoint import serialize
from tests.security.confined import MEGABYTES, SECONDS, Outcome, confined, confined_call

CONFIG = """
space: {nodes: 1, sparsity: 1}
search: {epochs: 1, max_pictures: 64, batch_size: 32, init_channels: 2, layers: 3, cutout: 2}
retrain: {epochs: 1, batch_size: 512, init_channels: 2, layers: 1, auxiliary_weight: 0, cutout: 2}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
GOOD = PUBLISHED["ISTA_twostage"].to_dict()
HUGE = 2**36  # apparent bytes of a sparse file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="confined by fork")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search and its finished retraining."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(["run", "--config", "tiny.yaml"]) == 0
    return folder


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(runs, tmp_path / "copy")


def run_of(folder: Path, job: str) -> Path:
    (path,) = (folder / "runs").glob(f"tiny-{job}-*")
    return path


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """Check that a command ended with a one-line error that has the words, and took little memory and time."""
    assert outcome.code == code, outcome
    (line,) = outcome.errors
    assert line.startswith("error: ")
    assert line.isprintable(), line
    assert all(word in line for word in words), line
    assert outcome.seconds < SECONDS / 2
    assert outcome.megabytes < 300, outcome.megabytes


class Bomb:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def sparse(path: Path) -> None:
    """Create a sparse file of 64 GB."""
    with open(path, "wb") as file:
        file.truncate(HUGE)


def test_memory_and_time_are_measured_and_bounded(tmp_path: Path) -> None:
    used = confined_call(lambda: len(b"x" * 200 * 2**20) * 0, tmp_path)
    assert used.code == 0
    assert 195 < used.megabytes < 230
    assert confined_call(lambda: len(bytearray(2 * MEGABYTES * 2**20)), tmp_path).errors[-1] == "MemoryError"


# ---------- genotypes
def cell(nodes: int, picks: int) -> str:
    node = "[" + ", ".join(['["skip_connect", 0]'] * picks) + "]"
    normal = "[" + ", ".join([node] * nodes) + "]"  # faster than json.dumps of a million lists
    return json.dumps({**GOOD, "normal": "", "normal_concat": [2]}).replace('""', normal)


GENOTYPES: dict[str, tuple[str, str]] = {
    "a million edges": (cell(1, 1_000_000), f"larger than {GENOTYPE_BYTES} bytes"),
    "a million nodes": (cell(1_000_000, 1), f"larger than {GENOTYPE_BYTES} bytes"),
    "edges that fit into the file": (
        cell(1, 40_000),
        "genotype.normal: 1 nodes with 40000 inputs are too many",
    ),
    "nodes that fit into the file": (cell(33, 1), "genotype.normal: 33 nodes with 33 inputs are too many"),
    "lists in lists": ("[" * 500_000, "not JSON"),
    "a number without end": (json.dumps(GOOD).replace("0]", "9" * 100_000 + "]", 1), "not JSON"),
    "a large number": (json.dumps(GOOD).replace("0]", "9" * 4_000 + "]", 1), "is out of range"),
    "a concatenation of much": (json.dumps({**GOOD, "reduce_concat": list(range(100_000))}), "reduce_concat"),
    "letters that are none": (
        json.dumps(GOOD).replace("skip_connect", "\\ud800\\u001b[2J\\n"),
        "is not a registered operation",
    ),
}


@pytest.mark.parametrize("name", GENOTYPES)
def test_a_hostile_genotype_is_refused_with_little_memory_and_time(name: str, tmp_path: Path) -> None:
    text, word = GENOTYPES[name]
    (tmp_path / "g.json").write_text(text)
    assert_refused(confined(["draw", "g.json"], tmp_path), 2, "g.json: ", word)
    assert not (tmp_path / "cells").exists()


def test_a_genotype_of_64_gigabytes_is_not_read(folder: Path) -> None:
    sparse(folder / "g.json")
    for command in (["draw", "g.json"], ["retrain", "--config", "tiny.yaml", "--genotype", "g.json"]):
        assert_refused(confined(command, folder), 2, "g.json", f"larger than {GENOTYPE_BYTES} bytes")
    sparse(run_of(folder, "search") / "genotype.json")
    search = str(run_of(folder, "search"))
    assert_refused(
        confined(["retrain", "--config", "tiny.yaml", "--genotype", search], folder), 2, "larger than"
    )
    for_compare = ["compare", "--config", "tiny.yaml", search, str(run_of(folder, "retrain"))]
    assert_refused(confined(for_compare, folder), 2, "larger than")


def test_the_largest_allowed_cell_is_read_and_has_a_digest(tmp_path: Path) -> None:
    from istanas.space import Genotype

    picks = [[["sep_conv_5x5", 1]] * 8] * 32
    genotype = Genotype.from_dict(
        {
            "version": 1,
            "normal": picks,
            "reduce": picks,
            "normal_concat": [33],
            "reduce_concat": [33],
        }
    )
    assert len(genotype.digest()) == 64


# ---------- configurations
def laughs(last: str) -> str:
    """Return YAML whose aliases expand exponentially."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["a0: &a0 [ha]", *lines, last])


def merges() -> str:
    lines = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    return "\n".join(["a0: &a0 {ha: 1}", *lines])


CONFIGS: dict[str, tuple[str, str]] = {
    "a Python call": ("seed: !!python/object/apply:os.mkdir [executed]", "not valid YAML"),
    "a Python module": ("seed: !!python/module:os", "not valid YAML"),
    "a Python object": ("seed: !!python/object/new:os.mkdir [executed]", "not valid YAML"),
    "billions of laughs": (laughs("seed: 1"), "more than 5000 keys and values"),
    "billions of merged keys": (merges(), "more than 5000 keys and values"),
    "an alias of itself": ("space: &a {ops: *a}", "more than 12 nested sections"),
    "a list that holds itself": ("space: &a [*a]", "more than 12 nested sections"),
    "sections in sections": ("a: " + "{a: " * 2_000 + "}" * 2_000, "not valid YAML"),
    "lists in lists": ("[" * 100_000, "not valid YAML"),
    "many keys": ("\n".join(f"key{i}: 1" for i in range(4_000)), "more than 5000"),
    "a number without end": ("seed: 1" + "0" * 100_000, "not valid YAML"),
    "a large number": ("seed: 1" + "0" * 4_000, "seed: "),
    "a long text": ("method: " + "x" * 200_000, "method: "),
    "too much": ("# " + "x" * 300_000, "larger than"),
    "bytes": ("seed: !!binary aGVsbG8=", "seed: "),
    "a set": ("space: !!set {nodes, ops}", "space: "),
    "a control character": ('data: {name: "\\e[2J\\n"}', "data.name: "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused_with_little_memory_and_time(name: str, tmp_path: Path) -> None:
    text, word = CONFIGS[name]
    (tmp_path / "c.yaml").write_text(text)
    assert_refused(confined(["search", "--config", "c.yaml"], tmp_path), 2, "c.yaml", word)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"], "code was run or a run was started"


def test_thousands_of_mistakes_are_reported_as_a_few(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("\n".join(f"key{i}: 1" for i in range(2_000)))
    outcome = confined(["search", "--config", "c.yaml"], tmp_path)
    assert (outcome.code, len(outcome.errors)) == (2, 21)
    assert outcome.errors[-1] == "error: c.yaml: 1980 more mistakes"
    assert outcome.seconds < SECONDS / 2


@pytest.mark.parametrize(
    "command", [["ui"], ["results"], ["sweep"], ["draw", "ISTA_twostage"], ["doctor"]], ids=" ".join
)
def test_every_command_refuses_a_hostile_configuration(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(laughs("seed: 1"))
    assert_refused(confined([*command, "--config", "c.yaml"], tmp_path), 2, "more than 5000 keys and values")


def test_a_configuration_of_64_gigabytes_is_not_read(folder: Path) -> None:
    sparse(folder / "c.yaml")
    for command in (["search"], ["ui"], ["results"]):
        assert_refused(confined([*command, "--config", "c.yaml"], folder), 2, "c.yaml", "larger than")
    sparse(run_of(folder, "retrain") / "config.yaml")
    assert_refused(
        confined(["export", str(run_of(folder, "retrain"))], folder), 2, "config.yaml", "larger than"
    )
    assert confined(["search", "--config", "/dev/zero"], folder).code == 2


def test_hostile_values_on_the_command_line_are_refused(tmp_path: Path) -> None:
    for value in ("seed=!!python/object/apply:os.mkdir [executed]", "seed=&a [*a]", "seed=" + "[" * 50_000):
        assert_refused(confined(["search", "--set", value], tmp_path), 2, "--set")
    assert_refused(confined(["search", "--set", "a." * 40_000 + "a=1"], tmp_path), 2, "--set", "names")
    assert not list(tmp_path.iterdir())


# ---------- run directories
RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lists in lists": lambda record: "[" * 500_000,
    "a list": lambda record: "[]",
    "a number as artifacts": lambda record: json.dumps({**record, "artifacts": 7}),
    "a list as result": lambda record: json.dumps({**record, "result": []}),
    "a text as time": lambda record: json.dumps({**record, "started_ms": "now"}),
    "an endless number": lambda record: json.dumps({**record, "started_ms": 1}).replace(": 1,", ": 1e999,"),
    "a status of lists": lambda record: json.dumps({**record, "status": [[]]}),
    "data sets of numbers": lambda record: json.dumps({**record, "datasets": [1, 2]}),
    "data sets without a shape": lambda record: json.dumps({**record, "datasets": [{"name": "digits"}]}),
}
READERS = ("compare", "export", "promote", "sync")


def reading(command: str, folder: Path) -> list[str]:
    retrain = str(run_of(folder, "retrain"))
    return [command, *([str(run_of(folder, "search"))] if command == "compare" else []), retrain]


@pytest.mark.parametrize("name", RECORDS)
def test_an_invalid_record_is_a_one_line_error(name: str, folder: Path) -> None:
    file = run_of(folder, "retrain") / "run.json"
    file.write_text(RECORDS[name](json.loads(file.read_text())))
    # All commands read a record with the same function. The first one is given to each of them.
    number = list(RECORDS).index(name)
    for command in READERS if number == 0 else READERS[number % len(READERS) :][:1]:
        assert_refused(confined(reading(command, folder), folder), 1, "run.json: ")


def test_a_record_or_metrics_of_64_gigabytes_are_not_read(folder: Path) -> None:
    sparse(run_of(folder, "retrain") / "metrics.jsonl")
    assert_refused(confined(reading("compare", folder), folder), 1, "metrics.jsonl: larger than")
    sparse(run_of(folder, "retrain") / "run.json")
    for command in READERS:
        assert_refused(confined(reading(command, folder), folder), 1, "run.json: ", "larger than")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1e999, "timestamp_ms": 1, "metrics": {}}',
        "[" * 100_000,
        '{"step": 1, "timestamp_ms": 1, "metrics": {"a": ' + "9" * 4000 + "}}",
        "7",
    ],
    ids=["endless", "deep", "large", "number"],
)
def test_invalid_metrics_are_a_one_line_error(line: str, folder: Path) -> None:
    (run_of(folder, "retrain") / "metrics.jsonl").write_text(line + "\n")
    assert_refused(
        confined(reading("compare", folder), folder), 1, "metrics.jsonl: line 1 is not a line of metrics"
    )


NETWORKS: dict[str, dict[str, Any]] = {
    "a million channels": {"init_channels": 1_000_000},
    "a million layers": {"layers": 1_000_000},
    "a million classes": {"num_classes": 10**9},
    "large pictures": {"preprocessing": {"shape": [1, 10**6, 10**6]}},
    "many channels of pictures": {"preprocessing": {"shape": [10**9, 8, 8]}},
    "no layer": {"layers": 0},
    "a genotype that is none": {"genotype": "[" * 100_000},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_larger_than_its_weights_is_not_built(name: str, folder: Path) -> None:
    file = run_of(folder, "retrain") / "network.json"
    card, changes = json.loads(file.read_text()), dict(NETWORKS[name])
    steps = {**card["preprocessing"], **changes.pop("preprocessing", {})}
    file.write_text(json.dumps({**card, **changes, "preprocessing": steps}))
    assert_refused(
        confined(reading("export", folder), folder), 1, "does not contain a complete trained network"
    )


def test_weights_are_never_unpickled(folder: Path) -> None:
    weights = run_of(folder, "retrain") / "model.safetensors"
    bomb = pickle.dumps(Bomb(folder / "executed"))
    for content in (bomb, struct.pack("<Q", 10**12) + b"{}", struct.pack("<Q", 10**7) + b" " * 10**7, b""):
        weights.write_bytes(content)
        assert_refused(
            confined(reading("export", folder), folder), 1, "does not contain a complete trained network"
        )
    assert not (folder / "executed").exists()


# ---------- checkpoints
def deflated(state: dict[str, Any]) -> bytes:
    """Return the same archive, compressed, with a member that expands to 512 MB of zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(serialize(state))) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            with packed.open(member.filename, "w", force_zip64=True) as part:
                if member.filename.endswith("data/0"):
                    for _ in range(32):
                        part.write(bytes(2**24))
                else:
                    part.write(plain.read(member))
    return buffer.getvalue()


def with_pickle(code: bytes) -> bytes:
    """Return a checkpoint with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(serialize({}))) as plain, zipfile.ZipFile(buffer, "w") as changed:
        for member in plain.infolist():
            changed.writestr(
                member.filename, code if member.filename.endswith(".pkl") else plain.read(member)
            )
    return buffer.getvalue()


# The pickle of `bytearray(10**12)`.
TERABYTE = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."
CHECKPOINTS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a call": (lambda folder: serialize({"net": Bomb(folder / "executed")}), "not plain data"),
    "a pickle": (lambda folder: pickle.dumps(Bomb(folder / "executed")), "not a zip file"),
    "compressed zeros": (lambda folder: deflated({"net": torch.ones(4)}), "compressed"),
    "a buffer of a terabyte": (lambda folder: with_pickle(TERABYTE), "bytearray"),
    "a list": (lambda folder: with_pickle(b"\x80\x02]."), "holds a list"),
}  # fmt: skip


def unfinished(run: Path, data: bytes) -> None:
    """Change a run into one that was stopped after its first epoch, with this checkpoint."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "RUNNING"}))
    (run / "checkpoints" / "epoch-0001.pt").write_bytes(data)
    manifest = {"epoch": 1, "file": "epoch-0001.pt", "sha256": hashlib.sha256(data).hexdigest()}
    (run / "checkpoints" / "epoch-0001.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_skipped_with_a_warning(name: str, folder: Path) -> None:
    make, word = CHECKPOINTS[name]
    run = run_of(folder, "search")
    unfinished(run, make(folder))
    outcome = confined(["search", "--config", "tiny.yaml"], folder)
    assert outcome.code == 0, outcome
    (line,) = {line for line in outcome.errors if "broken" in line}
    assert line.startswith("warning: checkpoint ")
    assert "epoch-0001.pt is broken (" in line
    assert word in line
    assert not (folder / "executed").exists()
    assert outcome.megabytes < 300


def pipe(file: Path) -> None:
    """Replace a file by a pipe, whose reader waits for a writer."""
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("epoch-0001.pt", pipe, "it is not a regular file"),
        ("epoch-0001.pt", sparse, f"it has {HUGE} bytes, not "),
        ("epoch-0001.json", pipe, "a pipe, not a file"),
        ("epoch-0001.json", sparse, "larger than "),
    ],
)
def test_a_checkpoint_that_is_a_pipe_or_exceeds_the_memory_is_skipped(
    name: str, harm: Callable[[Path], None], says: str, folder: Path
) -> None:
    run = run_of(folder, "search")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "RUNNING"}))
    harm(run / "checkpoints" / name)
    outcome = confined(["search", "--config", "tiny.yaml"], folder)
    assert outcome.code == 0, outcome
    assert outcome.megabytes < 300
    (broken,) = [line for line in outcome.errors if "is broken" in line]
    assert f"({says}" in broken


def test_a_network_and_a_table_of_trials_of_64_gigabytes_are_not_read(folder: Path) -> None:
    retrained = run_of(folder, "retrain")
    for harm, says in ((pipe, "a pipe, not a file"), (sparse, "larger")):
        harm(retrained / "model.safetensors")
        outcome = confined(["export", str(retrained)], folder)
        assert_refused(outcome, 1, f"does not contain a complete trained network ({says}")
        (retrained / "model.safetensors").unlink()
    sparse(retrained / "trials.csv")
    table = ["results", "--sweep", str(retrained)]
    assert_refused(confined(table, folder), 2, "trials.csv: not a valid table of trials (larger")


def test_a_job_that_exceeds_the_memory_is_a_one_line_error(folder: Path) -> None:
    outcome = confined(["search", "--config", "tiny.yaml", "--set", "search.init_channels=4096"], folder)
    assert outcome.code == 1
    assert outcome.errors[-1].startswith("error: out of memory ("), outcome
    assert "Traceback" not in "".join(outcome.errors)


def test_an_archive_with_names_outside_of_it_writes_no_file(folder: Path) -> None:
    """Checkpoints are the only archives that are read, and they are never unpacked."""
    run = run_of(folder, "search")
    archive = io.BytesIO((run / "checkpoints" / "epoch-0001.pt").read_bytes())
    with zipfile.ZipFile(archive, "a") as changed:
        for name in ("../../../out.evil", str(folder.parent / "absolute.evil"), "archive/../../out.evil"):
            changed.writestr(name, "written")
    unfinished(run, archive.getvalue())
    outcome = confined(["search", "--config", "tiny.yaml"], folder)
    assert outcome.code == 0, outcome
    assert not [path for path in folder.parent.rglob("*") if path.suffix == ".evil"]


def test_a_checkpoint_of_another_program_is_a_one_line_error(folder: Path) -> None:
    run = run_of(folder, "search")
    whole = torch.load(run / "checkpoints" / "epoch-0001.pt", weights_only=True)
    others = {"search": {}, "progress": 7, "history": 7}
    for state in ({}, {"weights": torch.ones(4)}, *({**whole, name: junk} for name, junk in others.items())):
        unfinished(run, serialize(state))
        assert_refused(confined(["search", "--config", "tiny.yaml"], folder), 1, "fresh")


# ---------- pictures
def png(width: int, height: int) -> bytes:
    """Return a black picture of one bit per pixel, as small as possible."""

    def part(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compressobj()
    row = bytes(1 + (width + 7) // 8)
    content = b"".join([*(rows.compress(row) for _ in range(height)), rows.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", content) + part(b"IEND", b"")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A picture folder of two classes."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(8):
                (tmp_path / "pictures" / split / name / f"{number}.png").write_bytes(png(16, 16))
    (tmp_path / "tiny.yaml").write_text(CONFIG + "data: {name: folder, root: pictures, cache_dir: cache}\n")
    return tmp_path / "pictures"


# Pillow only warns of the first size, and refuses the others.
@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
@pytest.mark.parametrize("name", ["0.png", "1.png"])  # the picture that is read first, and another one
def test_a_decompression_bomb_is_a_one_line_error(side: int, name: str, pictures: Path) -> None:
    (pictures / "train" / "ant" / name).write_bytes(
        png(side, side)
        if side < 60_000
        else png(side, 8).replace(struct.pack(">II", side, 8), struct.pack(">II", side, side), 1)
    )
    folder = pictures.parent
    for size in ([], ["--set", "data.image_size=16"]):
        outcome = confined(["search", "--config", "tiny.yaml", *size], folder)
        assert_refused(
            outcome, 1, f"{name} is not a readable picture (", "decompression bomb" if side < 60_000 else ""
        )


@pytest.mark.parametrize("place", ["train", "train/ant", "train/ant/9.png", "test/bee"])
def test_nothing_outside_of_a_picture_folder_is_shown(place: str, pictures: Path) -> None:
    outside = pictures.parent / "outside"
    shutil.copytree(pictures, outside)
    shutil.move(pictures / place, pictures.parent / "away") if (pictures / place).exists() else None
    target = outside / (place if "9.png" not in place else "train/ant/0.png")
    (pictures / place).symlink_to(os.path.relpath(target, (pictures / place).parent))  # through ".."
    outcome = confined(["search", "--config", "tiny.yaml"], pictures.parent)
    assert_refused(outcome, 1, f"pictures/{place} is a link that leads out of the folder")


def test_file_names_with_control_characters_are_escaped(pictures: Path) -> None:
    (pictures / "train" / "\x1b[2Jcat").mkdir()
    outcome = confined(["search", "--config", "tiny.yaml"], pictures.parent)
    assert_refused(outcome, 1, r"train/\x1b[2Jcat contains no picture")


def test_a_data_set_of_pickles_is_unpickled_only_if_it_is_published(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (raw / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    (tmp_path / "tiny.yaml").write_text(CONFIG + "data: {name: cifar10, root: data}\n")
    assert_refused(
        confined(["search", "--config", "tiny.yaml"], tmp_path), 1, "data does not contain a complete cifar10"
    )
    assert not (tmp_path / "executed").exists()
