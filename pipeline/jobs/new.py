"""A configuration for a picture folder, with a reason for each setting and an estimate of its time and memory.

The settings come from `pipeline.jobs.proposal`, the times from a few real steps of the search and of the retraining.
Nothing is written but the configuration, and the cache of the pictures that its jobs use.
"""

from __future__ import annotations

import math
import os
import resource
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from rich.console import Console

from istanas.data import Survey
from istanas.data.folders import count_of, has_class_folders_only, not_a_folder
from istanas.data.request import GivenFolder
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.limits import SMALL_SIDE
from istanas.space import random_genotype
from istanas.statistics import wilson_interval
from istanas.training import derive_seed
from pipeline.base.files import atomic_write, writable_file
from pipeline.base.text import duration
from pipeline.config.errors import layout_error_as_config_error
from pipeline.config.keys import value_at
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.config.threads import usable_cores
from pipeline.config.yaml_files import dump
from pipeline.jobs import proposal
from pipeline.jobs.context import say_pictures, say_to
from pipeline.jobs.lifecycle import check_data, load_data, progress_on
from pipeline.jobs.profile import Work, make_work, measure_steps, projection_of
from pipeline.jobs.proposal import NETWORKS, Networks
from pipeline.jobs.settings import overrides_of
from pipeline.training.compute import compute_for, describe_place
from pipeline.training.data_workers import report_lost_workers
from pipeline.training.pictures import decode_settings_of, describe_pictures, settle_stems, survey_of
from pipeline.training.profiling import seconds_of, step_seconds

OWN_FOLDER = GivenFolder("DIR", "name", divides="name a folder of")
STEPS = 5  # measured steps of each job
CELLS = 3  # random cells whose retraining is measured, because the cell that a search will find is not known
LINE = 110  # characters of a comment


class Choice(NamedTuple):
    """A proposed value, and its reason for the comment above it; an empty one belongs to the comment before."""

    value: Any
    reason: str = ""


@dataclass(frozen=True)
class Candidate:
    """A size of the pictures and of the networks.

    Args:
        image_size: Side in pixels to which pictures are scaled; None keeps their size.
        networks: The sizes of the networks.
    """

    image_size: int | None
    networks: Networks

    def __str__(self) -> str:
        side = "unscaled pictures" if self.image_size is None else f"pictures of {self.image_size} pixels"
        return f"{self.networks.name} networks for {side}"


class Measured(NamedTuple):
    """Measurements of a candidate.

    Args:
        seconds: Seconds of an epoch of the search and of the retraining.
        memory: Peak memory of this process in bytes.
        threads: `runtime.threads` for this measurement; `None` if it was not chosen here.
    """

    seconds: tuple[float, float]
    memory: int
    threads: Choice | None


class NewResult(TypedDict):
    """What `--json` prints. Seconds are estimates for this machine."""

    config: str
    name: str
    settings: dict[str, Any]
    search_seconds: float
    retrain_seconds: float
    seconds: float
    memory_bytes: int
    budget_seconds: NotRequired[float]


def run_new(
    folder: Path,
    *,
    out: Path | None,
    budget: float | None,
    force: bool,
    given: Sequence[str],
    console: Console,
) -> NewResult:
    """Write a configuration for a picture folder.

    Args:
        folder: The picture folder, see `istanas.data.folders`.
        out: The file; None for the name of the folder in the working directory.
        budget: Seconds that search and retraining should take together on this machine; None for the default lengths.
        force: Whether an existing file is replaced.
        given: Settings "key.path=value" that replace the proposed ones.
        console: Where lines for the user are written.

    Raises:
        ConfigError: The folder or the file is missing or cannot be used, a given setting is invalid, or the budget is
            too small.
        DataError: The pictures cannot be used.
    """
    root = Path(os.path.abspath(folder.expanduser()))
    target = _target(root, out, force)
    say = say_to(console)
    survey = _survey(root, given, console)
    drafts = _Drafts(root, survey, given, budget)
    too_few = _warnings_of_few_pictures(survey)
    for line in too_few:
        say(line)
    with report_lost_workers(drafts.first.runtime.data_workers):
        candidate, measured, epochs = _choose(drafts, budget, console)
    config, choices = drafts.config(candidate, epochs, measured.threads)
    retrained, searched = config.retrain.epochs, config.search.max_epochs
    seconds = (searched * measured.seconds[0], retrained * measured.seconds[1])
    lines = [
        f"search: {count_of(searched, 'epoch')}, about {duration(seconds[0])}",
        f"retraining: {count_of(retrained, 'epoch')}, about {duration(seconds[1])}",
        f"together: about {duration(sum(seconds))}"
        + (f" of a budget of {duration(budget)}" if budget is not None else "")
        + f", {measured.memory / 1e9:.1f} GB of memory",
    ]
    place = describe_place(compute_for(config.runtime), Ranks())
    shown = out if out is not None else Path(target.name)
    atomic_write(target, _as_yaml(config, choices, _heading(shown, drafts, place, [*lines, *too_few])))
    for line in lines:
        say(line)
    say(f"configuration: {shown}")
    say(f"run it: istanas run --config {shown}")
    result: NewResult = {
        "config": str(shown),
        "name": str(config.tracking.name),
        "settings": {key: value_at(config, key) for key in choices},
        "search_seconds": seconds[0],
        "retrain_seconds": seconds[1],
        "seconds": sum(seconds),
        "memory_bytes": measured.memory,
    }
    return result if budget is None else {**result, "budget_seconds": budget}


def _target(root: Path, out: Path | None, force: bool) -> Path:
    """Return the file to write, after a check of both paths."""
    if not root.is_dir():
        raise ConfigError(
            not_a_folder(root),
            field="DIR",
            remedy="name a folder with CLASS/*, or with train/CLASS/* and test/CLASS/*",
        )
    if out is None and not root.name:
        raise ConfigError(f"{root} has no name", field="DIR", remedy="name the configuration with --out FILE")
    file = Path(f"{root.name}.yaml") if out is None else out
    target = writable_file(file, "--out")
    if target.exists() and not force:
        raise ConfigError(
            f"{file} exists", field="--out", remedy="name another file, or replace it with --force"
        )
    return target


def _survey(root: Path, given: Sequence[str], console: Console) -> Survey:
    """Return the facts about the pictures; errors about the folder name the argument."""
    for override in given:
        key = override.partition("=")[0]
        if key in ("method", "data.name", "data.root") or ("." not in key and key != "seed"):
            raise ConfigError(
                "cannot be set here",
                field=f"--set {override!r:.60}",
                remedy="change it in the file, or give a key of another section, such as search.epochs=10",
            )
    with layout_error_as_config_error():
        config = load(None, _pictures(root, given))
        survey = survey_of(config.data, progress_on("checking", console), given=OWN_FOLDER)
    assert survey is not None, "a picture folder has one"
    return survey


def _pictures(root: Path, given: Sequence[str]) -> list[str]:
    """Return the settings that decide what the pictures are. Of a folder without splits, some are for testing."""
    known: dict[str, Any] = {"data.name": "folder", "data.root": root}
    if has_class_folders_only(root, OWN_FOLDER):
        known["data.test_fraction"] = proposal.TEST_FRACTION
    return [*overrides_of(known), *(each for each in given if each.startswith(("data.", "runtime.")))]


class _Drafts:
    """The configurations of the candidates for one folder.

    Args:
        root: The folder.
        survey: The facts about its pictures.
        given: Settings that replace the proposed ones.
        budget: Seconds of search and retraining together, for the comments; None if there is none.
    """

    def __init__(self, root: Path, survey: Survey, given: Sequence[str], budget: float | None) -> None:
        self.root, self.survey, self._given, self._budget = root, survey, tuple(given), budget
        n = survey.listing.n_train
        self.first = load(None, _pictures(root, self._given))
        self.is_grey = survey.is_grey(decode_settings_of(self.first.data, survey))
        train = survey.facts[:n]
        self.sizes = [(int(w), int(h)) for w, h in zip(train["width"], train["height"], strict=True)]
        self.holdout = proposal.holdout(n)
        self.n_used = n - round(self.holdout * n)
        self.batch = proposal.batch_size(self.n_used), proposal.batch_size(self.n_used // 2)

    def candidates(self) -> list[Candidate]:
        """Return the candidates, cheapest first: larger pictures, then larger networks."""
        sides = proposal.image_sides(self.sizes, is_large=self.survey.is_large)
        if self.first.data.image_size is not None:
            sides = (self.first.data.image_size,)
        smallest, *larger = NETWORKS
        return [
            *(Candidate(side, smallest) for side in sides),
            *(Candidate(sides[-1], networks) for networks in larger),
        ]

    def usual(self) -> Candidate:
        """Return the candidate without a budget: the largest pictures, and the smallest networks for few pictures."""
        largest = [each for each in self.candidates() if each.networks == NETWORKS[0]][-1]
        is_many = len(self.sizes) >= proposal.MANY_PICTURES
        return Candidate(largest.image_size, NETWORKS[1] if is_many else NETWORKS[0])

    def default_epochs(self) -> tuple[int, int]:
        """Return the epochs of search and retraining without a budget."""
        return proposal.default_epochs(self.n_used, self.batch[0])

    def config(
        self, candidate: Candidate, epochs: tuple[int, int], threads: Choice | None = None
    ) -> tuple[Config, dict[str, Choice]]:
        """Return the configuration of a candidate, and its settings with their reasons."""
        choices = self._choices(candidate, epochs)
        if threads is not None:
            choices["runtime.threads"] = threads
        keys = self.given_keys()
        proposed = {key: choice.value for key, choice in choices.items() if key not in keys}
        config = load(None, [*overrides_of(proposed), *self._given])
        given = {key: Choice(None, "Given with --set.") for key in keys}
        return config, {**choices, **given}

    def given_keys(self) -> list[str]:
        """Return the keys of the settings that replace the proposed ones."""
        return [override.partition("=")[0] for override in self._given]

    def _choices(self, candidate: Candidate, epochs: tuple[int, int]) -> dict[str, Choice]:
        n, side = len(self.sizes), self._side(candidate)
        retrain_batch, search_batch = self.batch
        large = side > SMALL_SIDE
        steps = epochs[0] * max(self.n_used // 2 // search_batch, 1)
        networks = candidate.networks
        kept = round(self.holdout * n)
        stem = "imagenet" if large else "cifar"
        within = "and no budget" if self._budget is None else f"within {duration(self._budget)}"
        path = (
            f"Above {SMALL_SIDE} pixels: pictures are read from their files in every epoch and cropped at random."
            if large
            else f"At most {SMALL_SIDE} pixels: pictures are decoded once and kept in memory."
        )
        return {
            "method": Choice("two_stage", "The search, then a retraining of the cell that it finds."),
            "data.name": Choice("folder"),
            "data.root": Choice(str(self.root)),
            **self._test_split(),
            "data.image_size": Choice(
                candidate.image_size,
                f"{'null keeps the size of the pictures' if candidate.image_size is None else 'Side in pixels'}; the "
                f"files have {self.survey.sizes()} pixels. {path}",
            ),
            "data.holdout": Choice(
                self.holdout,
                f"{kept:,} of {n:,} training pictures are kept for choosing between networks."
                if kept
                else f"A tenth of {n:,} training pictures would be too few to choose between networks.",
            ),
            "data.crop_padding": Choice(
                proposal.crop_padding(side),
                "Large pictures are cropped at random without padding."
                if large
                else "An eighth of the side, for random crops.",
            ),
            "data.horizontal_flip": Choice(
                proposal.flips(side, is_grey=self.is_grey),
                "Small grey pictures are often characters, which must not be mirrored."
                if self.is_grey and not large
                else "Set false if mirrored pictures would belong to another class.",
            ),
            "search.epochs": Choice(epochs[0], "See the estimate above. Time grows in proportion."),
            "search.batch_size": Choice(
                search_batch,
                _batch_reason(search_batch, self.n_used // 2),
            ),
            "search.init_channels": Choice(
                networks.search[0], f"The {networks.name} size, for {n:,} training pictures {within}."
            ),
            "search.layers": Choice(networks.search[1]),
            "search.stem": Choice(
                stem, f"The stem for pictures of {'more than' if large else 'at most'} {SMALL_SIDE} pixels."
            ),
            "search.lr": Choice(proposal.learning_rate(search_batch), "In proportion to the batch size."),
            "search.arch_lr": Choice(
                float(f"{proposal.alphas_learning_rate(steps):.1e}"),
                f"The fewer steps (here {steps:,}), the larger.",
            ),
            "retrain.epochs": Choice(epochs[1], "See the estimate above. Time grows in proportion."),
            "retrain.batch_size": Choice(
                retrain_batch,
                _batch_reason(retrain_batch, self.n_used),
            ),
            "retrain.init_channels": Choice(
                networks.retrain[0], f"The {networks.name} size, as in the search."
            ),
            "retrain.layers": Choice(networks.retrain[1]),
            "retrain.stem": Choice(stem, "As in the search."),
            "retrain.lr": Choice(proposal.learning_rate(retrain_batch), "In proportion to the batch size."),
            "retrain.nesterov": Choice(True, "As in cifar10_small_cpu, whose retraining is short, too."),
            "retrain.weight_decay": Choice(5e-4),
            "retrain.warmup_epochs": Choice(1 if epochs[1] > 4 else 0),
            "retrain.auxiliary_weight": Choice(
                0.0, "The auxiliary head, drop path and cutout help in trainings of hundreds of epochs."
            ),
            "retrain.drop_path": Choice(0.0),
            "retrain.cutout": Choice(0),
            "retrain.test_every": Choice(
                proposal.TEST_INTERVAL, "Epochs between measurements of the test split."
            ),
            "tracking.name": Choice(self.root.name, "The name of the runs."),
        }

    def _test_split(self) -> dict[str, Choice]:
        """Return the setting that divides a folder without splits."""
        if self.first.data.test_fraction == 0:
            return {}
        reason = (
            "The folder has no test split: this share of each class, the same pictures for every seed, measures the "
            "accuracy. If several pictures show one object, divide the folder yourself into train/ and test/."
        )
        return {"data.test_fraction": Choice(self.first.data.test_fraction, reason)}

    def _side(self, candidate: Candidate) -> int:
        return max(self.survey.shape(candidate.image_size))


def _warnings_of_few_pictures(survey: Survey) -> list[str]:
    """Return a warning for each split with too few pictures."""
    n_classes, n = len(survey.listing.class_names), survey.listing.n_train
    n_test = len(survey.listing.paths) - n
    lines = []
    if n < proposal.FEW_PER_CLASS * n_classes:
        lines.append(
            f"warning: {count_of(n, 'training picture')} of {n_classes} classes; a network needs at least "
            f"{proposal.FEW_PER_CLASS} pictures of each class, preferably hundreds"
        )
    if n_test < proposal.FEW_FOR_TESTING:
        interval = wilson_interval(n_test // 2, n_test)
        lines.append(
            f"warning: {count_of(n_test, 'test picture')}; the 95 % interval of the test accuracy may be "
            f"{100 * (interval.high - interval.low):.0f} points wide"
        )
    return lines


def _choose(
    drafts: _Drafts, budget: float | None, console: Console
) -> tuple[Candidate, Measured, tuple[int, int]]:
    """Measure candidates, and return the chosen one, its measurement and its epochs.

    With a budget, it is the largest one whose default epochs fit, or else the cheapest one with fewer epochs.
    """
    defaults = drafts.default_epochs()
    if budget is None:
        candidate = drafts.usual()
        return candidate, _measure(drafts, candidate, console), defaults
    best: tuple[Candidate, Measured] | None = None
    for candidate in drafts.candidates():
        measured = _measure(drafts, candidate, console)
        total = proposal.total_seconds(defaults, measured.seconds)
        if best is None or total <= budget:
            best = candidate, measured
        if proposal.GROWTH * total > budget:
            break
    assert best is not None, "there is a candidate"
    epochs = proposal.fitted_epochs(budget, best[1].seconds, defaults)
    if epochs is None:
        raise ConfigError(
            f"{duration(budget)} is less than an epoch of search and retraining, {duration(sum(best[1].seconds))}",
            field="--budget",
            remedy="give more time or fewer pictures, or measure when no other program uses the cores",
        )
    return *best, epochs


def _measure(drafts: _Drafts, candidate: Candidate, console: Console) -> Measured:
    """Measure some steps of the search, and of the retraining of random cells."""
    say = say_to(console)
    config, _ = drafts.config(candidate, drafts.default_epochs())
    config = settle_stems(config)
    dataset = load_data(config, console)
    jobs = ("search", "retrain")
    check_data(config, dataset, jobs)
    say_pictures(describe_pictures(config, dataset, (), ()), say)
    say(f"measuring {candidate}")
    compute = compute_for(config.runtime)
    torch.manual_seed(derive_seed(config.seed, "epoch", 0))
    threads = None
    if compute.device.type == "cpu" and "runtime.threads" not in drafts.given_keys():
        threads = _threads(make_work(config, dataset, compute))

    def epoch_seconds(work: Work) -> float:
        per_step, _, per_picture = measure_steps(work, STEPS, compute.device)
        return projection_of(work, per_step, per_picture, compute.device)["seconds"] / work.plan.epochs

    search = epoch_seconds(make_work(config, dataset, compute))
    space = config.space.build()
    retrain = fmean(
        epoch_seconds(make_work(config, dataset, compute, random_genotype(seed, space)))
        for seed in range(CELLS)
    )
    say(f"{candidate}: {duration(search)} for an epoch of the search, {duration(retrain)} of the retraining")
    return Measured((search, retrain), _peak_memory(compute.device), threads)


def _threads(work: Work) -> Choice | None:
    """Measure a step of the search with one thread and with all of this process, and use what `_faster` returns."""
    most = torch.get_num_threads()
    if most == 1:
        return Choice(1, "OMP_NUM_THREADS is 1.") if usable_cores() > 1 else None
    one = _step_with(work, 1)
    choice = _faster(one, _step_with(work, most, most_seconds=2 * one), most)
    torch.set_num_threads(most if choice.value is None else choice.value)
    return choice


def _step_with(work: Work, threads: int, most_seconds: float = math.inf) -> float:
    """Return the median seconds of a step after a warm-up, or those of the first step if it takes longer than a limit.

    Threads wait for each other, so that a step with several can take a hundred times as long as with one, where
    networks are small or other programs use the cores.
    """
    device = torch.device("cpu")
    torch.set_num_threads(threads)
    if (
        seconds_of(lambda: work.train(1, lambda: None), device) > most_seconds
    ):  # maybe because it is the first one
        (seconds,) = step_seconds(work.train, 1, device)
        if seconds > most_seconds:
            return seconds
    return median(step_seconds(work.train, STEPS, device))


def _faster(one: float, several: float, most: int) -> Choice:
    """Return the setting for the seconds of a step with one thread, and with `most`.

    Example:
        >>> _faster(0.05, 0.07, 2)
        Choice(value=1, reason='A step of the search took 50 ms with 1 thread, and 70 ms with 2.')
        >>> _faster(0.05, 0.03, 8)[0] is None
        True
    """
    reason = (
        f"A step of the search took {1e3 * one:.0f} ms with 1 thread, and {1e3 * several:.0f} ms with {most}."
    )
    if one <= several:
        return Choice(1, reason)
    return Choice(None, f"{reason} null has OMP_NUM_THREADS threads, or one for each core.")


def _peak_memory(device: torch.device) -> int:
    """Return the largest memory in bytes that this process had: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _heading(file: Path, drafts: _Drafts, place: str, lines: Sequence[str]) -> list[str]:
    listing = drafts.survey.listing
    channels = "grey, 1 channel" if drafts.is_grey else "colour, 3 channels"
    n_test = len(listing.paths) - listing.n_train
    quoted, name = shlex.quote(str(file)), f"{drafts.root.name}-2"
    return [
        f"Search and retraining on {listing.n_train:,} training and {n_test:,} test pictures of "
        f"{len(listing.class_names)} classes ({channels}).",
        "",
        f"  istanas run --config {quoted}",
        f"  istanas run --config {quoted} --set retrain.epochs=40 --set {shlex.quote(f'tracking.name={name}')}",
        "",
        f"Estimate from {STEPS} steps of the search and of the retraining of {CELLS} random cells:",
        f"  {place}",
        *(f"  {line}" for line in lines),
    ]


def _batch_reason(batch: int, n: int) -> str:
    steps = max(n // batch, 1)
    return f"From 16 to 64; {count_of(steps, 'step')} in an epoch of {count_of(n, 'picture')}."


def _as_yaml(config: Config, choices: Mapping[str, Choice], heading: Sequence[str]) -> str:
    """Return the settings as YAML, each below a comment with its reason. The values are those of the configuration."""
    lines = [*(f"# {line}".rstrip() for line in heading), ""]
    sections = dict.fromkeys(key.rpartition(".")[0] for key in choices)
    for section in sections:
        indent = "  " if section else ""
        lines += [f"{section}:"] if section else []
        for key, choice in choices.items():
            if key.rpartition(".")[0] == section:
                comment = textwrap.wrap(choice.reason, LINE) if choice.reason else []
                setting = dump({key.rpartition(".")[2]: value_at(config, key)}).splitlines()
                lines += [f"{indent}{line}" for line in (*(f"# {line}" for line in comment), *setting)]
    return "\n".join(lines) + "\n"
