"""The registry of data sets, and the stratified splits: everything about pictures up to the first batch.

Three ways in: scikit-learn's digits (embedded, no download), torchvision's data sets, and any picture folder
`train/CLASS/*`, `test/CLASS/*`. Small pictures end as one uint8 array; large ones stay in their files.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from istanas.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int], None]

SMALL_SIDE = 64
"""Pictures with both sides up to this many pixels are decoded once and kept in memory."""

DEFAULT_IMAGE_SIZE = 224
"""Side in pixels that large pictures are brought to when nobody says otherwise."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PICTURE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)

# What Pillow may take a file for, whatever its suffix says: PostScript, say, would start another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_CHUNK = 500  # pictures a pool process decodes at a time: some 50 ms of work, 1.5 MB of result
_POOL_FROM = 4 * _CHUNK  # below this many pictures, starting processes costs more than it saves
_CACHE_VERSION = 1


# ---------- what a data set is
@dataclass(frozen=True, eq=False)
class ArrayPictures:
    """Small pictures, decoded, in memory.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, number of classes).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.labels.numel()


@dataclass(frozen=True, eq=False)
class FilePictures:
    """Large pictures, decoded whenever a batch wants them.

    Args:
        paths: N files.
        labels: (N,) int64 in [0, number of classes).
        image_size: side in pixels of the square that a network gets.
    """

    paths: tuple[str, ...]
    labels: Tensor
    image_size: int

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.labels.numel()


Pictures = ArrayPictures | FilePictures


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set with its two splits and what a network must know of it.

    Args:
        name: its name in the registry.
        class_names: one a label, in the order of the labels.
        train: pictures to learn from.
        test: pictures that never choose anything.
        channels: 1 or 3.
        height: pixels, as a network sees them.
        width: pixels, as a network sees them.
        mean: per channel, in [0, 1], of the training split (of ImageNet for large pictures).
        std: per channel, in (0, 1]; at least 1/255, so that a constant channel can be divided by it.
        digest: SHA-256 of the content (arrays) or of the files' names and sizes (large pictures); the same on
            every machine that holds the same pictures.
    """

    name: str
    class_names: tuple[str, ...]
    train: Pictures
    test: Pictures
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class _Request:
    """The arguments of `load_dataset`, with the defaults filled in."""

    name: str
    root: Path | None
    download: bool
    cache_dir: Path
    image_size: int | None
    progress: Progress | None


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    cache_dir: str | Path | None = None,
    image_size: int | None = None,
    progress: Progress | None = None,
) -> ImageDataset:
    """Load a data set by its name.

    Args:
        name: a key of `DATASETS`.
        root: the picture folder, or where torchvision's files lie (default for those: `cache_dir`/downloads).
        download: fetch torchvision's files if they are absent.
        cache_dir: where decoded folders are kept; default `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`.
        image_size: side in pixels to bring the pictures to; at most 64 keeps them in memory, more reads files
            on the fly (folders only). Default: as they are, or 224 for large ones.
        progress: called with (pictures decoded, pictures in all) while a folder is decoded.

    Returns:
        The data set, pictures on the CPU.

    Raises:
        ConfigError: no such name, or a size that cannot be.
        DataError: pictures that are missing or broken.

    Example:
        >>> digits = load_dataset("digits")
        >>> len(digits.train), len(digits.test), digits.num_classes
        (1438, 359, 10)
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.name: {name!r} is no data set; {hint}choose one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size: {image_size} is no side of a picture; use 1 or more pixels")
    request = _Request(
        name=name,
        root=None if root is None else Path(root).expanduser(),
        download=download,
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
        image_size=image_size,
        progress=progress,
    )
    return DATASETS[name](request)


def pictures_digest(pictures: Pictures, indices: Tensor, class_names: Sequence[str]) -> str:
    """BLAKE2 of some pictures of a split, with their labels and the names of the classes, in their order.

    Args:
        pictures: the split.
        indices: (n,) int64, which of them.
        class_names: one a label.

    Returns:
        Of decoded pictures the digest of their content, of files that of their names (class and file) and sizes:
        64 hexadecimal digits, the same on every machine that holds the same pictures.

    Raises:
        DataError: if a file is gone.

    Example:
        >>> digits = load_dataset("digits")
        >>> first = torch.arange(10)
        >>> digest = pictures_digest(digits.train, first, digits.class_names)
        >>> len(digest), digest == pictures_digest(digits.test, first, digits.class_names)
        (64, False)
    """
    labels = pictures.labels[indices]
    head = [list(class_names), labels.tolist()]
    if isinstance(pictures, FilePictures):
        files = [Path(pictures.paths[index]) for index in indices.tolist()]
        try:
            contents = [("/".join(file.parts[-2:]), file.stat().st_size) for file in files]
        except OSError as error:
            raise DataError(f"data.root: {error.filename} is gone ({_reason(error)}); restore it") from None
        return hashlib.blake2b(
            json.dumps([*head, pictures.image_size, contents]).encode(), digest_size=32
        ).hexdigest()
    # BLAKE2, because it is the fastest of the library's safe ones: 50,000 pictures of CIFAR-10 are 150 MB.
    digest = hashlib.blake2b(json.dumps([*head, list(pictures.images.shape[1:])]).encode(), digest_size=32)
    for chunk in indices.split(4096):  # a copy of all could be many GB
        digest.update(pictures.images[chunk].contiguous().numpy().reshape(-1).data)
    return digest.hexdigest()


# ---------- stratified splits
def stratified_split(labels: Tensor | Sequence[int], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the indices in two, so that each class is split in the same proportion.

    Class c gives floor(q_c) or floor(q_c) + 1 of its pictures, q_c = fraction n_c, by the largest remainders;
    the whole part has round(fraction N).

    Args:
        labels: (N,) integers.
        fraction: share of the second part, in [0, 1].
        seed: of the draw within each class.

    Returns:
        (rest, part): sorted int64 indices, disjoint, together 0..N-1.

    Raises:
        ConfigError: a fraction outside [0, 1].

    Example:
        >>> rest, part = stratified_split([0, 0, 0, 0, 1, 1], 0.5, seed=0)
        >>> len(rest), sorted([0, 0, 0, 0, 1, 1][i] for i in part)
        (3, [0, 0, 1])
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"fraction: {fraction} is no share of a data set; use a number in [0, 1]")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    part = _stratified_part(labels, fraction, round(fraction * labels.numel()), seed)
    return part.logical_not().nonzero()[:, 0], part.nonzero()[:, 0]


def stratified_subset(labels: Tensor | Sequence[int], count: int, seed: int) -> Tensor:
    """Choose `count` pictures with the classes in the proportions of the whole.

    Args:
        labels: (N,) integers.
        count: how many, >= 1; N or more takes all.
        seed: of the draw within each class.

    Returns:
        (min(count, N),) sorted int64 indices.

    Raises:
        ConfigError: a count below 1.

    Example:
        >>> stratified_subset([0] * 6 + [1] * 4, 5, seed=0).lt(6).sum().item()
        3
    """
    if count < 1:
        raise ConfigError(f"count: {count} pictures are too few; use 1 or more")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    count = min(count, labels.numel())
    return _stratified_part(labels, count / max(labels.numel(), 1), count, seed).nonzero()[:, 0]


def _stratified_part(labels: Tensor, fraction: float, total: int, seed: int) -> Tensor:
    """Mark `total` indices, of each class its share `fraction` to within one: (N,) bools."""
    sizes = torch.bincount(labels)
    generator = torch.Generator().manual_seed(seed)
    quota = sizes.double() * fraction
    taken = torch.floor(quota + 1e-9).long()  # 0.29 * 100 is 28.999999999999996
    # Equal remainders are ranked by lot, so that it is not always the same classes that go without.
    lot = torch.rand(sizes.numel(), generator=generator, dtype=torch.float64)
    missing = total - int(taken.sum())
    taken[torch.argsort(quota - taken + 1e-9 * lot, descending=True)[:missing]] += 1
    # A random order, stably sorted by class: the first `taken` of each class are a draw without replacement.
    order = torch.randperm(labels.numel(), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    rank = torch.arange(labels.numel()) - (sizes.cumsum(0) - sizes)[labels[order]]
    part = torch.zeros(labels.numel(), dtype=torch.bool)
    part[order[rank < taken[labels[order]]]] = True
    return part


# ---------- arrays
def _load_digits(request: _Request) -> ImageDataset:
    """Load scikit-learn's 1,797 handwritten digits; the test split is the same fifth for every seed."""
    # Its file only: to import scikit-learn takes a second, and every worker and trial of a job would wait for it.
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 greys of 0..16, and the digit
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = torch.as_tensor(rows[:, -1], dtype=torch.int64)
    rest, part = stratified_split(labels, 0.2, seed=0)
    pictures = torch.from_numpy(images)
    return _array_dataset(
        request,
        [str(digit) for digit in range(10)],
        ArrayPictures(pictures[rest], labels[rest]),
        ArrayPictures(pictures[part], labels[part]),
    )


_TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "svhn": "SVHN",
}


def _load_torchvision(request: _Request) -> ImageDataset:
    """Load one of torchvision's data sets from its files."""
    root = request.cache_dir / "downloads" if request.root is None else request.root
    splits: list[ArrayPictures] = []
    for train in (True, False):
        source = _open_torchvision(request, root, train)
        images = torch.as_tensor(source.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:  # CIFAR comes as (N, H, W, C), SVHN as (N, C, H, W)
            images = images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(source.labels if request.name == "svhn" else source.targets)
        splits.append(ArrayPictures(images.contiguous(), labels.long()))
    class_names = getattr(source, "classes", None) or [str(digit) for digit in range(10)]
    return _array_dataset(request, class_names, *splits)


def _open_torchvision(request: _Request, root: Path, train: bool) -> Any:
    """Construct torchvision's data set, its many ways to fail turned into one line."""
    import torchvision.datasets

    split = {"split": "train" if train else "test"} if request.name == "svhn" else {"train": train}
    try:
        return getattr(torchvision.datasets, _TORCHVISION[request.name])(
            root, download=request.download, **split
        )
    except Exception as error:  # absent, truncated, unreachable, not permitted, a wrong checksum ...
        if request.download:
            raise DataError(
                f"data.download: {request.name} could not be had in {root} ({_reason(error)}); "
                "check the network and the disk, or set data.root to a copy of it"
            ) from error
        raise DataError(
            f"data.root: {root} holds no complete {request.name}; "
            "set data.root to where it lies, or download it with --set data.download=true"
        ) from error


def _array_dataset(
    request: _Request, class_names: Sequence[str], train: ArrayPictures, test: ArrayPictures
) -> ImageDataset:
    """Check, resize if asked to, and describe two splits that are in memory."""
    for split, pictures in (("train", train), ("test", test)):
        n, labels = len(pictures), pictures.labels
        if n == 0 or pictures.images.shape[0] != n:
            raise DataError(
                f"data.root: the {split} split of {request.name} has {pictures.images.shape[0]} pictures "
                f"and {n} labels; fetch it anew"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
            raise DataError(
                f"data.root: the {split} split of {request.name} has labels {int(labels.min())}.."
                f"{int(labels.max())} for {len(class_names)} classes; fetch it anew"
            )
    if request.image_size is not None and request.name != "folder":
        if request.image_size > SMALL_SIDE:
            raise ConfigError(
                f"data.image_size: {request.image_size} is too large for {request.name}, kept in memory; "
                f"use at most {SMALL_SIDE} or a picture folder (data.name=folder)"
            )
        train, test = (
            ArrayPictures(_resize(pictures.images, request.image_size), pictures.labels)
            for pictures in (train, test)
        )
    mean, std = _channel_statistics(train.images)
    content = _sha256(
        json.dumps([list(class_names), list(train.images.shape), list(test.images.shape)]).encode(),
        *(part.contiguous().numpy().data for split in (train, test) for part in (split.images, split.labels)),
    )
    _, channels, height, width = train.images.shape
    return ImageDataset(
        request.name, tuple(class_names), train, test, channels, height, width, mean, std, content
    )


def _resize(images: Tensor, size: int) -> Tensor:
    """Bring (N, C, H, W) bytes to (N, C, size, size), antialiased."""
    if images.shape[2:] == (size, size):
        return images
    resized = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .byte()
        for chunk in torch.split(images, 1000)
    ]
    return torch.cat(resized)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in [0, 1], exact: from the 256 counts of each byte."""
    counts = np.zeros((images.shape[1], 256))
    for chunk in torch.split(images, 1000):
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(chunk[:, channel].numpy().ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(((values - mean[:, None]) ** 2 * share).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


# ---------- picture folders
@dataclass(frozen=True)
class _Listing:
    """The files of a picture folder: training pictures first, each split sorted by class and name."""

    class_names: tuple[str, ...]
    paths: tuple[str, ...]  # relative to the folder
    labels: Tensor
    n_train: int
    digest: str  # of names and sizes
    state: str  # of all that changes with a file, even with equal times: what a cache must match


def _load_folder(request: _Request) -> ImageDataset:
    """Load `train/CLASS/*` and `test/CLASS/*` (or `val/CLASS/*`)."""
    if request.root is None:
        raise ConfigError("data.root: not set; name the picture folder with --set data.root=DIR")
    listing = _list_folder(request.root)
    size = request.image_size
    if size is None and _has_large_pictures(request.root, listing):
        size = DEFAULT_IMAGE_SIZE
    if size is not None and size > SMALL_SIDE:
        return _file_dataset(request, listing, size)
    images = torch.from_numpy(_cached_pictures(request, listing))
    n = listing.n_train
    return _array_dataset(
        request,
        listing.class_names,
        ArrayPictures(images[:n], listing.labels[:n]),
        ArrayPictures(images[n:], listing.labels[n:]),
    )


def _file_dataset(request: _Request, listing: _Listing, size: int) -> ImageDataset:
    """Describe a folder whose pictures stay in their files."""
    assert request.root is not None
    paths = tuple(str(request.root / path) for path in listing.paths)
    n = listing.n_train
    return ImageDataset(
        name=request.name,
        class_names=listing.class_names,
        train=FilePictures(paths[:n], listing.labels[:n], size),
        test=FilePictures(paths[n:], listing.labels[n:], size),
        channels=3,
        height=size,
        width=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        digest=_sha256(f"{listing.digest} {size}".encode()),
    )


def _list_folder(root: Path) -> _Listing:
    """Find the classes and pictures of both splits."""
    if not root.is_dir():
        raise DataError(f"data.root: {root} is no folder; name one that holds train/CLASS/* and test/CLASS/*")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"data.root: {folder} is missing; pictures lie in train/CLASS/* and test/CLASS/*")
        _refuse_link_out(folder, root)
    class_names = _directories(train, root)
    if len(class_names) < 2:
        raise DataError(
            f"data.root: {train} holds {len(class_names)} classes; it takes two, a folder for each"
        )
    strangers = sorted(set(_directories(test, root)) - set(class_names))
    if strangers:
        raise DataError(
            f"data.root: {test / strangers[0]} is a class that {train} lacks; add it there or remove it here"
        )
    files: list[tuple[str, int, _FileState]] = []
    n_train = 0
    for folder in (train, test):
        for label, class_name in enumerate(class_names):
            found = list(_picture_files(folder / class_name, root))
            if not found and folder == train:
                raise DataError(
                    f"data.root: {folder / class_name} holds no picture; "
                    f"add some ({' '.join(sorted(PICTURE_SUFFIXES))}) or remove the class"
                )
            files += [(path, label, state) for path, state in found]
        n_train = n_train or len(files)
    if len(files) == n_train:
        raise DataError(f"data.root: {test} holds no picture; add pictures of the classes to test by")
    contents = [(path, state.size) for path, _, state in files]
    return _Listing(
        class_names=class_names,
        paths=tuple(path for path, *_ in files),
        labels=torch.tensor([label for _, label, *_ in files], dtype=torch.int64),
        n_train=n_train,
        digest=_sha256(json.dumps([class_names, n_train, contents]).encode()),
        state=_sha256(json.dumps([class_names, n_train, files]).encode()),
    )


def _directories(folder: Path, root: Path) -> tuple[str, ...]:
    """Name the folders in a folder, sorted."""
    found = [entry for entry in _entries(folder) if entry.is_dir()]
    for entry in found:
        _refuse_link_out(entry, root)
    return tuple(entry.name for entry in found)


class _FileState(NamedTuple):
    """What tells a file from another one that takes its place.

    The time of writing is not enough: archives bring equal times with them, and moving a file keeps its own. No
    program sets the time of the last change of a file's entry, and a moved file keeps its inode.
    """

    size: int
    written_ns: int
    changed_ns: int
    inode: int


def _picture_files(folder: Path, root: Path) -> Iterator[tuple[str, _FileState]]:
    """Yield each picture of a class, by name, as a path relative to the root."""
    for entry in _entries(folder) if folder.is_dir() else []:
        if os.path.splitext(entry.name)[1].lower() not in PICTURE_SUFFIXES or entry.is_dir():
            continue
        _refuse_link_out(entry, root)
        try:
            facts = entry.stat()
            if not stat.S_ISREG(facts.st_mode):  # reading from a pipe would never end
                raise OSError("no regular file")
        except OSError as error:
            raise _unreadable(entry.path, error) from error
        state = _FileState(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        yield f"{folder.parent.name}/{folder.name}/{entry.name}", state


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder by name, hidden entries left out."""
    try:
        with os.scandir(folder) as scan:
            return sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(
            f"data.root: {folder} cannot be listed ({_reason(error)}); check its permissions"
        ) from error


def _refuse_link_out(path: Path | os.DirEntry[str], root: Path) -> None:
    """Raise if the path is a link that leads out of the root.

    A picture folder often comes from somebody else: it should show nothing but itself.
    """
    if not path.is_symlink():
        return
    inside, target = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([inside, target]) != inside:
        raise DataError(
            f"data.root: {os.fspath(path)} is a link that leads out of the folder, to {target}; "
            "put a copy in its place, or set data.root to a folder that holds both"
        )


def _has_large_pictures(root: Path, listing: _Listing) -> bool:
    """Tell by the first picture of each class whether the folder is one of large pictures (headers only)."""
    labels = listing.labels[: listing.n_train]
    firsts = torch.searchsorted(labels, torch.arange(len(listing.class_names))).tolist()
    return any(max(_picture_size(str(root / listing.paths[first]))) > SMALL_SIDE for first in firsts)


def _picture_size(path: str) -> tuple[int, int]:
    """Read (width, height) from a picture's header."""
    try:
        with _opened(path) as picture:
            return picture.size
    except Exception as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open a picture of at most as many pixels as Pillow takes for harmless: up to twice as many it only warns of."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(path, formats=_FORMATS)
    with picture:
        yield picture


def read_picture(path: str) -> tuple[Image.Image, bool]:
    """Decode a picture file to RGB.

    Args:
        path: the file.

    Returns:
        (the picture, whether the file was grey).

    Raises:
        DataError: whatever is wrong with the file, Pillow's limit on decompression bombs included.

    Example:
        >>> read_picture("no.png")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        istanas.errors.DataError: data.root: no.png is no readable picture (No such file or directory); ...
    """
    from PIL import Image

    try:
        with _opened(path) as picture:
            mode = picture.mode
            if mode.startswith("I;16"):
                # Pillow's own conversion saturates 16 bits instead of scaling them.
                return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB"), True
            if mode in {"I", "F"}:
                raise ValueError(f"pixels of mode {mode} have no fixed range")
            if mode == "RGB":
                picture.load()
                return picture.copy(), False
            return picture.convert("RGB"), mode in {"1", "L", "LA", "La"}
    except Exception as error:  # broken files raise anything: OSError, SyntaxError, struct.error ...
        raise _unreadable(path, error) from error


def _decode_chunk(paths: Sequence[str], size: int | None) -> tuple[NDArray[np.uint8], bool]:
    """Decode pictures to (n, H, W, 3) bytes, size x size if given; and tell whether all were grey."""
    from PIL import Image, ImageOps

    arrays: list[NDArray[np.uint8]] = []
    all_grey = True
    for path in paths:
        picture, grey = read_picture(path)
        all_grey &= grey
        if size is not None and picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        array = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
        if arrays and array.shape != arrays[0].shape:
            raise _unequal(path, array.shape, arrays[0].shape)
        arrays.append(array)
    return np.stack(arrays), all_grey


def _decode_pictures(paths: Sequence[str], size: int | None, progress: Progress | None) -> NDArray[np.uint8]:
    """Decode all pictures to (N, C, H, W) bytes: one channel if every file is grey, else three."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    images: NDArray[np.uint8] | None = None
    all_grey, done = True, 0
    for chunk, grey in _decoded_chunks(chunks, size, pool=len(paths) >= _POOL_FROM):
        if images is None:
            images = np.empty((len(paths), 3, *chunk.shape[1:3]), np.uint8)
        if chunk.shape[1:3] != images.shape[2:]:
            raise _unequal(paths[done], chunk.shape[1:], images.shape[2:])
        images[done : done + len(chunk)] = chunk.transpose(0, 3, 1, 2)
        all_grey &= grey
        done += len(chunk)
        if progress is not None:
            progress(done, len(paths))
    assert images is not None
    return np.ascontiguousarray(images[:, :1]) if all_grey else images


def _decoded_chunks(
    chunks: Sequence[Sequence[str]], size: int | None, pool: bool
) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """Yield the decoded chunks in order, from a process for each core if there are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not pool or cores == 1:
        yield from (_decode_chunk(chunk, size) for chunk in chunks)
        return
    # Processes, because small pictures are mostly interpreter work, where threads only wait for one another.
    executor = ProcessPoolExecutor(min(cores, len(chunks)))
    try:
        yield from executor.map(_decode_chunk, chunks, [size] * len(chunks))
    except BrokenProcessPool as error:
        raise DataError("data.root: a decoding process was killed; free some memory and try again") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _unreadable(path: str, error: Exception) -> DataError:
    """Name the picture that cannot be used, and why."""
    return DataError(f"data.root: {path} is no readable picture ({_reason(error)}); replace or delete it")


def _unequal(path: str, shape: Sequence[int], expected: Sequence[int]) -> DataError:
    """Name the picture whose size is not that of the others."""
    return DataError(
        f"data.root: {path} has {shape[1]}x{shape[0]} pixels, others have {expected[1]}x{expected[0]}; "
        f"bring all to one size with --set data.image_size={min(SMALL_SIDE, max(expected[:2]))}"
    )


# ---------- the cache
def _cached_pictures(request: _Request, listing: _Listing) -> NDArray[np.uint8]:
    """Return the decoded folder (N, C, H, W), from the cache if that was made of the folder as it is now."""
    assert request.root is not None
    state = f"{_CACHE_VERSION} {request.image_size} {listing.state}"
    key = _sha256(json.dumps([os.path.realpath(request.root), request.image_size]).encode())
    file = request.cache_dir / f"folder-{key[:16]}.pictures"
    images = _read_cache(file, state)
    if images is None:
        root = request.root
        images = _decode_pictures(
            [str(root / path) for path in listing.paths], request.image_size, request.progress
        )
        _write_cache(file, state, images)
    return images


def _read_cache(file: Path, state: str) -> NDArray[np.uint8] | None:
    """Read a cache; None if there is none, it is of another state, or (with a warning) it is broken."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.readline(10_000))
            if header["state"] != state:
                return None
            body = np.empty(os.fstat(stream.fileno()).st_size - stream.tell(), np.uint8)
            stream.readinto(body.data)
        if header["sha256"] != _cache_checksum(state, header["shape"], body):
            raise ValueError("wrong checksum")
        return body.reshape(header["shape"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"{file}: broken cache ({_reason(error)}); it is made anew", stacklevel=2)
        return None


def _write_cache(file: Path, state: str, images: NDArray[np.uint8]) -> None:
    """Write a cache as a header line and the bytes: whole or not at all."""
    header = {
        "state": state,
        "shape": list(images.shape),
        "sha256": _cache_checksum(state, images.shape, images),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
        try:
            with open(descriptor, "wb") as stream:
                stream.write(json.dumps(header).encode() + b"\n")
                stream.write(images.data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"{file}: the cache cannot be written ({_reason(error)}); the pictures will be decoded again "
            "next time unless data.cache_dir is a folder that can be written",
            stacklevel=2,
        )


def _cache_checksum(state: str, shape: Iterable[int], body: NDArray[np.uint8]) -> str:
    return _sha256(json.dumps([state, list(shape)]).encode(), body.data)


def default_cache_dir() -> Path:
    """Return where caches belong on this system: `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "istanas"


def _sha256(*parts: bytes | memoryview) -> str:
    """Return the SHA-256 of some bytes one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """Say on one line what went wrong: the system's words, the error's text, or its class."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()) or type(error).__name__


DATASETS: Mapping[str, Callable[[_Request], ImageDataset]] = {
    "digits": _load_digits,
    **dict.fromkeys(_TORCHVISION, _load_torchvision),
    "folder": _load_folder,
}
"""The data sets by name."""
