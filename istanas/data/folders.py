"""Picture folders: which files in `train/CLASS/*` and `test/CLASS/*`, or in `CLASS/*`, are their pictures.

Files are listed, and classes, splits and what is left out are decided, before any picture is read.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from istanas.data.cache import reason, sha256
from istanas.data.reading import (
    PICTURE_SUFFIXES,
    Broken,
    shown,
    unreadable,
)
from istanas.data.request import DATA_ROOT, GivenFolder
from istanas.data.splits import stratified_split
from istanas.errors import DataError, LayoutError

LEFT_OUT_SHARE = 0.01
"""Share of a class's files that may be left out without `allow_left_out`."""

# Files with these suffixes accompany pictures, so they are ignored. A file with any other suffix may contain pictures
# in an unsupported format (HEIC, AVIF, raw files, archives), so it is counted and reported.
_COMPANIONS = frozenset(
    {
        *(".cfg", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".log", ".md", ".py", ".sh"),
        *(".toml", ".tsv", ".txt", ".url", ".xml", ".xmp", ".yaml", ".yml"),
    }
)

# The first of these folders that exists is the test split. Other folders that usually contain pictures are reported.
TEST_SPLITS = ("test", "val")
_OTHER_SPLITS = frozenset({*TEST_SPLITS, "valid", "validation"})
_SPLITS = frozenset({"train", *_OTHER_SPLITS})


class FileState(NamedTuple):
    """The metadata by which a replaced file is detected.

    The time of the last write is not enough: archives restore equal times, and a moved file keeps its time. Programs
    cannot set the ctime, the time of the last change of a file's metadata, and a moved file keeps its inode.
    """

    size: int
    written_ns: int
    changed_ns: int
    inode: int


@dataclass
class LeftOut:
    """The files of a folder that are ignored for one reason.

    Args:
        why: The reason, such as "in sub-folders".
        example: Path of the first file.
        count: Number of files.
    """

    why: str
    example: str
    count: int = 0

    def __str__(self) -> str:
        """Return a line for the user."""
        return f"{count_of(self.count, 'file')} {self.why}, such as {shown(self.example)}"


@dataclass(frozen=True)
class Listing:
    """The files of a picture folder: training pictures first, each split sorted by class and name.

    Args:
        root: The folder.
        class_names: Names of the classes, sorted.
        paths: Paths of the files, relative to the root.
        labels: Class indices, (N,) int64.
        n_train: Number of training pictures.
        state: Digest of all metadata of the files; a cache is valid if it was made in the same state.
        left_out: Ignored files, by reason.
        kind: What the pictures lie in, in messages.
        read_from: Where large pictures are read from, in messages.
        given: How error messages name the folder.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: Sequence[str]
    labels: Tensor
    n_train: int
    state: str
    left_out: tuple[LeftOut, ...]
    kind: str = "folder"
    read_from: str = "their files"
    given: GivenFolder = DATA_ROOT

    @property
    def untested(self) -> tuple[str, ...]:
        """Return the classes without a test picture."""
        counts = torch.bincount(self.labels[self.n_train :], minlength=len(self.class_names)).tolist()
        return tuple(name for name, n in zip(self.class_names, counts, strict=True) if n == 0)

    @property
    def place(self) -> str:
        """Return the real path of the folder, by which caches are named."""
        return os.path.realpath(self.root)

    @property
    def prefix(self) -> str:
        """Return the beginning of `files` that leads to the root."""
        return os.path.join(self.root, "")

    @cached_property
    def files(self) -> Sequence[str]:
        """Return the full paths; computed once, as there may be millions."""
        return tuple(str(self.root / path) for path in self.paths)


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    Args:
        number: The number.
        noun: The singular.
        plural: The plural; by default `noun` with an s.

    Example:
        >>> count_of(1, "picture"), count_of(2000, "picture"), count_of(0, "class", "classes")
        ('1 picture', '2,000 pictures', '0 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def not_a_folder(path: Path) -> str:
    """Return what is wrong with a path at which there is no folder.

    Example:
        >>> not_a_folder(Path("/nowhere"))
        'no such folder: /nowhere'
    """
    return (
        f"{shown(path)} is a file, not a folder" if os.path.exists(path) else f"no such folder: {shown(path)}"
    )


def list_folder(
    root: Path,
    *,
    allow_left_out: bool = False,
    test_fraction: float = 0.0,
    given: GivenFolder = DATA_ROOT,
) -> Listing:
    """Find the classes and pictures of both splits.

    Args:
        root: The folder.
        allow_left_out: Whether more than `LEFT_OUT_SHARE` of a class may be left out.
        test_fraction: 0 for a folder with `train/CLASS/*` and `test/CLASS/*`. Otherwise, the folder has `CLASS/*`, and
            this share of each class is the test split, the same one in every call.
        given: How error messages name the folder.

    Raises:
        LayoutError: If the root is not a picture folder.
        DataError: If too many files would be left out, or a link leads out of the folder.
    """
    check_text(root, str(root), given)
    if not root.is_dir():
        raise LayoutError(
            not_a_folder(root),
            field=given.field,
            remedy=f"{given.change} a folder with train/CLASS/* and test/CLASS/*",
        )
    if test_fraction > 0:
        return _list_classes(root, allow_left_out, test_fraction, given)
    train = root / "train"
    test = next((root / name for name in TEST_SPLITS if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise _missing_split(folder, root, given)
        _refuse_link_out(folder, root, given)
    class_names = _class_names(train, test, root, given)
    left_out = _LeftOuts(root, given, allow_left_out)
    files: list[tuple[str, int, FileState]] = []
    n_train = 0
    for folder in (train, test):
        n_before = len(files)
        for label, class_name in enumerate(class_names):
            found = _read_class(folder / class_name, root, left_out)
            if not found and folder == train:
                raise LayoutError(
                    f"{shown(folder / class_name)} contains no picture",
                    field=given.field,
                    remedy=f"add some ({' '.join(sorted(PICTURE_SUFFIXES))}) or remove the class",
                )
            files += [(path, label, state) for path, state in found]
        loose = [
            (entry.path, "outside the class folders") for entry in _entries(folder, given) if _is_loose(entry)
        ]
        left_out.add(folder, len(files) - n_before, loose)
        n_train = n_train or len(files)
    if len(files) == n_train:
        raise LayoutError(
            f"{shown(test)} contains no picture", field=given.field, remedy="add test pictures of the classes"
        )
    for entry in _entries(root, given):
        if entry.is_dir(follow_symlinks=False) and entry.name in _OTHER_SPLITS - {test.name}:
            why = f"in {entry.name}/, which is ignored because {test.name}/ exists"
            left_out.count((path, why) for path in _below(entry.path))
    return _listing(root, class_names, files, n_train, left_out)


def has_class_folders_only(root: Path, given: GivenFolder) -> bool:
    """Return whether a folder contains class folders and no split, so that it requires a `test_fraction`.

    Args:
        root: The folder.
        given: How error messages name it.

    Raises:
        DataError: If it cannot be listed.
    """
    names = {entry.name for entry in _entries(root, given) if entry.is_dir()}
    return len(names) > 1 and not names & _SPLITS


def _list_classes(root: Path, allow_left_out: bool, test_fraction: float, given: GivenFolder) -> Listing:
    """Find the classes and pictures of a folder without splits, and choose its test pictures."""
    for name in sorted(_SPLITS):
        if (root / name).is_dir():
            raise LayoutError(
                f"{test_fraction} would divide the class folders of {shown(root)}, which has {name}/",
                field=given.test_fraction,
                remedy=f"set it to 0 to use the splits of the folder, or {given.change} one of them",
            )
    class_names, left_out = _class_names(root, root, root, given), _LeftOuts(root, given, allow_left_out)
    files: list[tuple[str, int, FileState]] = []
    for label, class_name in enumerate(class_names):
        files += [(path, label, state) for path, state in _read_class(root / class_name, root, left_out)]
    loose = [(entry.path, "outside the class folders") for entry in _entries(root, given) if _is_loose(entry)]
    left_out.add(root, len(files), loose)
    labels = torch.tensor([label for _, label, _ in files], dtype=torch.int64)
    train, test = stratified_split(labels, test_fraction, seed=0)
    trained = torch.bincount(labels[train], minlength=len(class_names)).tolist()
    for name, n, of_class in zip(
        class_names, trained, torch.bincount(labels, minlength=len(class_names)).tolist(), strict=True
    ):
        if n == 0:
            rest = f"{count_of(of_class, 'picture')}, of which none would be left for training"
            raise LayoutError(
                f"{shown(root / name)} contains {rest if of_class else 'no picture'}",
                field=given.field,
                remedy=f"add some ({' '.join(sorted(PICTURE_SUFFIXES))}) or remove the class",
            )
    if len(test) == 0:
        raise LayoutError(
            f"{test_fraction} of {count_of(len(files), 'picture')} is no test picture",
            field=given.test_fraction,
            remedy="raise it",
        )
    ordered = [files[index] for index in (*train.tolist(), *test.tolist())]
    return _listing(root, class_names, ordered, len(train), left_out)


def _listing(
    root: Path,
    class_names: tuple[str, ...],
    files: Sequence[tuple[str, int, FileState]],
    n_train: int,
    left_out: _LeftOuts,
) -> Listing:
    """Return the listing of files (path, label, metadata), training pictures first."""
    return Listing(
        root=root,
        class_names=class_names,
        paths=tuple(path for path, *_ in files),
        labels=torch.tensor([label for _, label, _ in files], dtype=torch.int64),
        n_train=n_train,
        state=sha256(json.dumps([class_names, n_train, files]).encode()),
        left_out=tuple(left_out.by_reason.values()),
        given=left_out.given,
    )


@dataclass
class _LeftOuts:
    """Counts of the files that are left out, with a limit on their share.

    Args:
        root: The picture folder.
        given: How error messages name it.
        allowed: Whether any share is accepted.
        by_reason: The files that were left out so far.
    """

    root: Path
    given: GivenFolder
    allowed: bool
    by_reason: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, folder: Path, n_read: int, files: Sequence[tuple[str, str]]) -> None:
        """Count the left-out files (path, reason) of a folder of which `n_read` pictures are read.

        Raises:
            DataError: If too many files are left out.
        """
        here = _by_reason({}, files)
        self.count(files)
        total = n_read + len(files)
        if len(files) > LEFT_OUT_SHARE * total and not self.allowed:
            reasons = "; ".join(map(str, here.values()))
            raise DataError(
                f"{len(files):,} of {total:,} files of {shown(folder)} would be left out ({reasons})",
                field=self.given.field,
                remedy=f"move or convert them, or ignore them with {self.given.allow_left_out}",
            )

    def count(self, files: Iterable[tuple[str, str]]) -> None:
        """Count left-out files (path, reason) without a limit."""
        _by_reason(self.by_reason, files)


def _by_reason(counted: dict[str, LeftOut], files: Iterable[tuple[str, str]]) -> dict[str, LeftOut]:
    """Add files (path, reason) to the counts, and return the counts."""
    for path, why in files:
        counted.setdefault(why, LeftOut(why, path)).count += 1
    return counted


def _read_class(folder: Path, root: Path, left_out: _LeftOuts) -> list[tuple[str, FileState]]:
    """Return the pictures of a class, sorted by name, as paths relative to the root."""
    given = left_out.given
    pictures: list[tuple[str, FileState]] = []
    others: list[tuple[str, str]] = []
    prefix = folder.relative_to(root).as_posix()
    for entry in _entries(folder, given) if folder.is_dir() else []:
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            _refuse_link_out(entry, root, given)
            others += [(path, "in sub-folders") for path in _below(entry.path)]
        elif suffix in PICTURE_SUFFIXES:
            _refuse_link_out(entry, root, given)
            pictures.append((f"{prefix}/{entry.name}", _state(entry, given)))
        elif suffix not in _COMPANIONS:
            others.append((entry.path, f"with the suffix {shown(suffix)}" if suffix else "without a suffix"))
    left_out.add(folder, len(pictures), others)
    return pictures


def class_pictures(
    folder: Path, root: Path, given: GivenFolder = DATA_ROOT
) -> tuple[list[str], tuple[LeftOut, ...]]:
    """Return the pictures in a class folder that a training reads, sorted by name, and the files that it leaves out.

    Args:
        folder: The folder of the class.
        root: The picture folder, which contains it.
        given: How error messages name the picture folder.

    Raises:
        DataError: If the folder cannot be listed, or has a link that leads out of the root.
    """
    left_out = _LeftOuts(root, given, allowed=True)
    found = [str(root / path) for path, _ in _read_class(folder, root, left_out)]
    return found, tuple(left_out.by_reason.values())


def pictures_below(root: Path, given: GivenFolder = DATA_ROOT) -> Iterator[str]:
    """Yield the pictures in a folder and its sub-folders, sorted by name, without hidden ones.

    Links are followed, also to folders, and each folder is read once.

    Args:
        root: The folder.
        given: How error messages name it.

    Raises:
        DataError: If a folder cannot be listed, or a link leads out of the root.
    """
    yield from _pictures_below(root, root, {os.path.realpath(root)}, given)


def _pictures_below(folder: Path, root: Path, seen: set[str], given: GivenFolder) -> Iterator[str]:
    """Yield the pictures below a folder; `seen` has the real paths of the folders that were read."""
    inside: list[Path] = []
    for entry in _entries(folder, given):
        if entry.is_dir():
            inside.append(Path(entry.path))
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
            _refuse_link_out(entry, root, given)
            yield entry.path
    for path in inside:
        _refuse_link_out(path, root, given)
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield from _pictures_below(path, root, seen, given)


def _state(entry: os.DirEntry[str], given: GivenFolder) -> FileState:
    try:
        facts = entry.stat()
        if not stat.S_ISREG(facts.st_mode):  # reading from a pipe could block for ever
            raise OSError("not a regular file")
    except OSError as error:
        raise unreadable(Broken.by(entry.path, error), field=given.field) from error
    return FileState(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


def _is_loose(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry beside the class folders may be a misplaced picture."""
    return not entry.is_dir() and os.path.splitext(entry.name)[1].lower() not in _COMPANIONS


def _below(folder: str) -> Iterator[str]:
    """Yield the files in a folder and its sub-folders that may be pictures."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in _COMPANIONS:
                yield os.path.join(where, name)


def _class_names(train: Path, test: Path, root: Path, given: GivenFolder) -> tuple[str, ...]:
    """Return the sorted classes, which are the folders in `train`. `test` may lack some of them."""
    class_names = _directories(train, root, given)
    if len(class_names) < 2:
        raise _too_few_classes(train, root, given)
    known: dict[str, Path] = {}
    trained = set(class_names)
    for folder in (train, test):
        for name in _directories(folder, root, given) if folder == test else class_names:
            form = unicodedata.normalize("NFC", name)
            twin = known.setdefault(form, folder / name)
            if twin.name != name:
                raise DataError(
                    f"{shown(twin)} and {shown(folder / name)} are names of one class with different code points "
                    f"({_code_points(twin.name, name)})",
                    field=given.field,
                    remedy="give both the same name",
                )
            if folder == test and name not in trained:
                raise DataError(
                    f"{shown(test / name)} is a class without a folder in {shown(train)}",
                    field=given.field,
                    remedy="add one, or remove this one",
                )
    return class_names


def _missing_split(folder: Path, root: Path, given: GivenFolder) -> LayoutError:
    """Return the error for a picture folder without the folder of a split."""
    has_split = any((root / name).is_dir() for name in _SPLITS)
    nested = _nested_remedy(root, given)
    names = _directories(root, root, given)
    if (
        not has_split
        and nested is None
        and len(names) == 1
        and has_class_folders_only(root / names[0], given)
    ):
        inner = root / names[0]
        return LayoutError(
            f"{shown(root)} has only one folder, {shown(names[0])}, which has the class folders",
            field=given.field,
            remedy=f"{given.change} {shown(inner)}",
        )
    if not has_split and nested is None and len(names) < 2:
        return _too_few_classes(root, root, given)
    is_test = folder.name in TEST_SPLITS
    such_as = f", such as {shown(root / 'train')}" if is_test else ""
    return LayoutError(
        f"{shown(folder)} is missing",
        field=given.field,
        remedy=nested
        or f"put the pictures into {'' if is_test else 'train/CLASS/* and '}test/CLASS/*, or {given.divides} CLASS/*"
        f"{such_as}",
    )


def _too_few_classes(folder: Path, root: Path, given: GivenFolder) -> LayoutError:
    """Return the error for a folder that should contain a folder for each class, but has none or only one."""
    names = _directories(folder, root, given)
    place = "/".join([*folder.relative_to(root).parts, "CLASS/*"])
    pictures = list(itertools.islice(pictures_below(folder, given), 1 if names else None))
    if not pictures:
        problem = "has no pictures"
        remedy = f"put them into {place}, one folder for each class"
    elif names:
        problem = f"has only one class, {shown(names[0])}"
        remedy = "two or more are needed, each in its own folder"
    else:
        problem = f"has {count_of(len(pictures), 'picture')} but no class folders"
        remedy = f"put them into {place}"
    return LayoutError(
        f"{shown(folder)} {problem}", field=given.field, remedy=_nested_remedy(folder, given) or remedy
    )


def _code_points(first: str, second: str) -> str:
    """Return the code points in which two names differ, as text."""
    start = next(i for i in range(len(first) + 1) if first[: i + 1] != second[: i + 1])
    return " and ".join(
        " ".join(f"U+{ord(c):04X}" for c in name[start : start + 3]) for name in (first, second)
    )


def check_text(path: Path, name: str, given: GivenFolder = DATA_ROOT, what: str = "folder") -> None:
    """Raise an error if a name is not UTF-8, because it could not be written into files.

    Args:
        path: The folder or file.
        name: Its name.
        given: How error messages name the picture folder that contains it.
        what: What it is.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name of {shown(path)} is not UTF-8", field=given.field, remedy=f"rename the {what}"
        ) from None


def _nested_remedy(folder: Path, given: GivenFolder) -> str | None:
    """Return the remedy for an archive that was unpacked one level too deep, as in `photos/photos/train`; or None."""
    inside = [Path(entry.path) for entry in _entries(folder, given) if entry.is_dir()]
    for path in inside:
        if (path / "train").is_dir():
            return f"{given.change} {shown(path)}"
        if len(inside) == 1 and path.name == folder.name:
            return f"move the folders in {shown(path)} one level up"
    return None


def _directories(folder: Path, root: Path, given: GivenFolder) -> tuple[str, ...]:
    """Return the names of the folders in a folder, sorted."""
    found = [entry for entry in _entries(folder, given) if entry.is_dir()]
    for entry in found:
        _refuse_link_out(entry, root, given)
        check_text(Path(entry.path), entry.name, given)
    return tuple(entry.name for entry in found)


def _entries(folder: Path, given: GivenFolder = DATA_ROOT) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as scan:
            return sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(
            f"{shown(folder)} cannot be listed ({reason(error)})",
            field=given.field,
            remedy="check its permissions",
        ) from error


def _refuse_link_out(path: Path | os.DirEntry[str], root: Path, given: GivenFolder = DATA_ROOT) -> None:
    """Raise an error if the path is a link that leads out of the root.

    A picture folder may come from an untrusted source, and must not expose other files.
    """
    if not path.is_symlink():
        return
    inside, target = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([inside, target]) != inside:
        raise DataError(
            f"{shown(path)} is a link that leads out of the folder, to {shown(target)}",
            field=given.field,
            remedy=f"put a copy in its place, or {given.change} a folder that contains both",
        )
