"""The commands for pictures, the configuration and this machine: new, pack, config, doctor, profile and latency."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    STARTS_OVER,
    Command,
    complete_file,
    complete_folder,
    config_options,
    hint_after_interrupt,
    json_option,
    placement_options,
    set_option,
)
from pipeline.cli.output import console_for, print_json
from pipeline.config.choices import JPEG_QUALITY
from pipeline.jobs.settings import load_config, load_for_genotype


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path), shell_complete=complete_folder)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    shell_complete=complete_file,
    metavar="FILE",
    help="File to write. Default: the name of the folder, with .yaml, in the working directory.",
)
@click.option(
    "--budget",
    metavar="TIME",
    help="Time for search and retraining together on this machine, such as 30m, 2h or 1d. Without it, the lengths "
    "depend on the number of pictures.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@set_option
@json_option
def new(
    folder: Path, out: Path | None, budget: str | None, force: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Write a configuration for a picture folder.

    DIR has CLASS/*, or train/CLASS/* and test/CLASS/*. The sizes of pictures and networks, batches and epochs follow
    from the pictures and from the time of a few real steps on this machine. The file says why each value was chosen.
    """
    from pipeline.jobs.new import run_new
    from pipeline.jobs.proposal import budget_seconds

    seconds = None if budget is None else budget_seconds(budget)
    result = run_new(
        folder, out=out, budget=seconds, force=force, given=overrides, console=console_for(as_json)
    )
    if as_json:
        print_json(result)


@click.command(cls=Command, resumes=True)
@click.argument(
    "folder",
    metavar="[DIR]",
    required=False,
    type=click.Path(path_type=Path),
    shell_complete=complete_folder,
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    shell_complete=complete_folder,
    metavar="DIR",
    help="Folder of the shards and their index. It is created.",
)
@click.option(
    "--shard-size", default="256MB", show_default=True, metavar="SIZE", help="Largest size of a shard."
)
@click.option(
    "--resize",
    type=click.IntRange(min=8),
    metavar="PIXELS",
    help="Reduce the shorter side of larger pictures to this. Without it, the bytes of the files are packed.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    help=f"Quality of the pictures that --resize reduces, as JPEG. [default: {JPEG_QUALITY}]",
)
@click.option(
    "--allow-left-out",
    is_flag=True,
    help="Pack even if more than 1 % of a class's files cannot be read (sub-folders, unsupported suffixes).",
)
@click.option(
    "--test-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="FRACTION",
    help="Fraction of each class of DIR/CLASS/* that becomes the test split, as with data.test_fraction. Without it, "
    "DIR has train/CLASS/* and test/CLASS/*.",
)
@click.option(
    "--index",
    "indexed",
    type=click.Path(path_type=Path),
    shell_complete=complete_folder,
    metavar="DIR",
    help="Write the index of shards that another program has made: train/*.tar and test/*.tar (or val/*.tar).",
)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path),
    shell_complete=complete_folder,
    metavar="DIR",
    help="Compare every shard with its checksum.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of processes. Default: one per usable core.",
)
@json_option
def pack(
    folder: Path | None,
    out: Path | None,
    shard_size: str,
    resize: int | None,
    quality: int | None,
    allow_left_out: bool,
    test_fraction: float,
    indexed: Path | None,
    checked: Path | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Pack a picture folder into shards, large tar files.

    DIR has train/CLASS/* and test/CLASS/*, or CLASS/* with --test-fraction. Jobs read shards with data.name:
    webdataset, from a disk, a network file system or a bucket. The same command continues after an interruption, and
    writes the same bytes. The layout is that of WebDataset: 000001.jpg, 000001.cls and 000001.json.
    """
    given = [name for name, value in (("DIR", folder), ("--index", indexed), ("--check", checked)) if value]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "none is given"
        raise click.UsageError(f"DIR, --index or --check: {found}, give one of them")
    if (out is None) == (folder is not None):
        raise click.UsageError(
            "--out: it belongs to the picture folder DIR, "
            + ("name a folder for the shards" if folder else "leave it out")
        )
    if quality is not None and resize is None:
        raise click.UsageError(
            "--quality: it has an effect on reduced pictures only; add --resize, or leave it out"
        )
    for name, path in (("DIR", folder), ("--out", out), ("--index", indexed), ("--check", checked)):
        if re.match(r"\w+:/", str(path)):  # a path has lost the second slash
            raise click.UsageError(
                f"{name}: an address; pack into a folder, and copy it with the tool of the bucket's provider"
            )
    from pipeline.jobs import pack as job

    console = console_for(as_json)
    if folder is not None and out is not None:
        result = job.run_pack(
            folder,
            out,
            shard_size=job.size_in_bytes(shard_size),
            resize=resize,
            quality=JPEG_QUALITY if quality is None else quality,
            allow_left_out=allow_left_out,
            test_fraction=test_fraction,
            processes=processes,
            console=console,
        )
    else:
        with hint_after_interrupt(STARTS_OVER):
            if indexed is not None:
                result = job.run_index(indexed, processes=processes, console=console)
            else:
                assert checked is not None
                result = job.run_check(checked, processes=processes, console=console)
    if as_json:
        print_json(result)


@click.command(name="config", cls=Command)
@click.option(
    "--describe",
    is_flag=False,
    flag_value="",
    metavar="[KEY]",
    help="Explain a key: type, range, default and meaning. A section, or the beginning of a key, lists its keys; "
    "without KEY, all keys are listed.",
)
@click.option("--json-schema", "schema", is_flag=True, help="Write the JSON schema of the file, for editors.")
@click.option("--list", "listed", is_flag=True, help="List the configurations that istanas contains.")
@click.option("--copy", "copied", metavar="NAME", help="Print one of them as it is, with its comments.")
@config_options
@json_option
def config_command(
    describe: str | None,
    schema: bool,
    listed: bool,
    copied: str | None,
    file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print or list configurations, or explain their keys.

    Without an option, the resolved configuration is printed. The output is a valid configuration file: istanas config
    --config FILE --set search.epochs=10 > my.yaml. Passwords in the addresses of stores are left out. The ranges of a
    sweep are checked by istanas sweep --dry-run.
    """
    options = (
        ("--describe", describe is not None),
        ("--json-schema", schema),
        ("--list", listed),
        ("--copy", copied is not None),
    )
    alone = [name for name, given in options if given]
    others = [name for name, given in (("--config", file), ("--set", overrides)) if given]
    if alone and len(alone + others) > 1:
        raise click.UsageError(f"{alone[0]} does not take {(alone + others)[1]}, leave one of them out")
    from pipeline.config import describe as description
    from pipeline.config import load as configuration

    if listed:
        purposes = {name: configuration.purpose(file) for name, file in configuration.shipped_files().items()}
        if as_json:
            print_json({"configurations": purposes})
        else:
            width = max(map(len, purposes))
            click.echo("\n".join(f"{name:{width}}  {text}" for name, text in purposes.items()))
    elif copied is not None:
        text = configuration.shipped_file(copied).read_text()
        if as_json:
            print_json({"name": copied, "text": text})
        else:
            click.echo(text, nl=False)
    elif describe is not None:
        keys = description.describe(describe)
        if as_json:
            print_json({"keys": [key.as_json() for key in keys]})
        else:
            click.echo(description.as_text(keys, min(shutil.get_terminal_size().columns, 120)))
    elif schema:
        click.echo(json.dumps(description.json_schema(), indent=None if as_json else 2))
    else:
        config, _ = load_config(file, overrides)
        public = configuration.without_passwords(config)
        if public != config:
            click.echo("warning: passwords in the addresses of stores are left out", err=True)
        if as_json:
            print_json({"config": configuration.to_tree(public)})
        else:
            click.echo(configuration.to_yaml(public), nl=False)


@click.command(cls=Command)
@config_options
@placement_options
@json_option
def doctor(as_json: bool, **settings: Any) -> None:
    """Check packages, GPUs, threads, MLflow store, licence and data.

    Each check prints one line, with the remedy if it fails. Exit code 0: no check failed.
    """
    config, _ = load_config(**settings)
    from pipeline.cli.doctor import run_checks

    checks = run_checks(
        tracking_uri=config.tracking.uri,
        data=config.data,
        workers=config.runtime.workers,
        threads=config.runtime.threads,
        address=config.runtime.address,
    )
    for check in checks:
        remedy = f"; {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:4}  {check.name}: {check.message}{remedy}", err=as_json)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    raise click.exceptions.Exit(1 if any(check.state == "fail" for check in checks) else 0)


@click.command(cls=Command)
@click.option(
    "--job",
    type=click.Choice(["search", "retrain"]),
    help="Job to profile: search, or retrain with --genotype. [default: search]",
)
@click.option(
    "--genotype",
    metavar="FILE|NAME|RUN|random:SEED|TEXT",
    shell_complete=complete_file,
    help="Genotype to retrain, as for istanas retrain.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Number of steps to measure."
)
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a Chrome trace of one step."
)
@config_options
@json_option
def profile(
    job: str | None, genotype: str | None, steps: int, trace: Path | None, as_json: bool, **settings: Any
) -> None:
    """Measure some training steps and estimate the time of a run.

    The steps run in this process, on the real pictures, and their results are discarded. The report says where the time
    goes, and which share of the machine's peak performance is reached.
    """
    if (job == "retrain" and genotype is None) or (job == "search" and genotype is not None):
        raise click.UsageError(
            "--genotype: a retraining needs one and a search has none, give both --job retrain and --genotype"
        )
    console = console_for(as_json)
    from pipeline.jobs.profile import print_profile, run_profile

    cells = None
    if genotype is None:
        config, _ = load_config(**settings)
    else:
        cells, _, config, _ = load_for_genotype(genotype, console, **settings)
    result = run_profile(config, genotype=cells, steps=steps, trace=trace, console=console)
    print_profile(result, console)
    if as_json:
        print_json(result)


@click.command(cls=Command)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=complete_file,
    metavar="FILE",
    help="File of the table (JSON), which search.latency_table names.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to measure on. Default: runtime.device."
)
@click.option(
    "--backend",
    type=click.Choice(["torch", "onnxruntime"]),
    default="torch",
    show_default=True,
    help="What executes the networks.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: runtime.threads.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of pictures in a batch.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=2),
    default=30,
    show_default=True,
    help="Number of runs of each candidate. A busy machine requires more.",
)
@config_options
@json_option
def latency(out: Path, backend: str, batch_size: int, runs: int, as_json: bool, **settings: Any) -> None:
    """Measure how long each candidate takes, for a search.

    Every candidate of the space is measured with the inputs that it has in the target network, and some random networks
    as a whole. A search predicts the latency of networks from the table: search.max_latency_ms, search.cost=latency.
    """
    config, _ = load_config(**settings)
    console = console_for(as_json)
    from pipeline.jobs.latency import print_latency, run_latency

    result = run_latency(
        config,
        backend="onnxruntime" if backend == "onnxruntime" else "torch",
        batch_size=batch_size,
        runs=runs,
        out=out,
        console=console,
    )
    print_latency(result, console)
    if as_json:
        print_json(result)


COMMANDS = (new, pack, config_command, doctor, profile, latency)
