"""The registry of data sets, and the stratified splits: everything about pictures up to the first batch.

Three ways in: scikit-learn's digits (embedded, no download), torchvision's data sets, and any picture folder
`train/CLASS/*`, `test/CLASS/*`. Small pictures end as one uint8 array; large ones stay in their files.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from istanas.data.cache import default_cache_dir, read_cache, reason, sha256, write_cache
from istanas.data.folders import Listing, Survey, cache_file, describe, survey_folder
from istanas.data.reading import PLAIN, Progress, Reading, decode_pictures
from istanas.errors import ConfigError, DataError
from istanas.limits import SMALL_SIDE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CACHE_VERSION = 3
FILES_VERSION = 3
"""Of the way in which large pictures are read: another one makes another data set of the same files."""


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
        fingerprints: 8 bytes a file: a digest of its size and of samples of its content.
        reading: how the pixels are read.
    """

    paths: tuple[str, ...]
    labels: Tensor
    image_size: int
    fingerprints: bytes
    reading: Reading = PLAIN

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
        digest: SHA-256 of the content (arrays), or of the files' names, sizes and samples of their content (large
            pictures); the same on every machine that holds the same pictures.
        train_digest: likewise, of the training pictures alone; "" of a data set without a name for it.
        reading: how the pixels of picture files are read.
        notes: lines for people: what there is, how it is brought to the network, what its owner may not know.
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
    train_digest: str = ""
    reading: Reading = PLAIN
    notes: tuple[str, ...] = ()

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
    background: tuple[int, int, int]
    allow_left_out: bool
    progress: Progress | None
    checking: Progress | None


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    cache_dir: str | Path | None = None,
    image_size: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    allow_left_out: bool = False,
    progress: Progress | None = None,
    checking: Progress | None = None,
) -> ImageDataset:
    """Load a data set by its name.

    Args:
        name: a key of `DATASETS`.
        root: the picture folder, or where torchvision's files lie (default for those: `cache_dir`/downloads).
        download: fetch torchvision's files if they are absent.
        cache_dir: where decoded folders are kept; default `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`.
        image_size: side in pixels to bring the pictures to; at most 64 keeps them in memory, more reads files
            on the fly (folders only). Default: as they are, or 224 for large ones.
        background: (red, green, blue) in 0..255, over which transparent pictures of a folder are composited.
        allow_left_out: whether more than a hundredth of a class of a folder may be left out, because it lies in
            sub-folders or has a suffix that is not read.
        progress: called with (pictures decoded, pictures in all) while a folder is decoded.
        checking: called with (pictures checked, pictures in all) while the headers of a folder are read.

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
    request = _checked_request(
        _Request(
            name=name,
            root=None if root is None else Path(root).expanduser(),
            download=download,
            cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
            image_size=image_size,
            background=background,
            allow_left_out=allow_left_out,
            progress=progress,
            checking=checking,
        )
    )
    return DATASETS[name](request)


def _checked_request(request: _Request) -> _Request:
    name, image_size = request.name, request.image_size
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.name: {name!r} is no data set; {hint}choose one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size: {image_size} is no side of a picture; use 1 or more pixels")
    return request


def pictures_digest(pictures: Pictures, indices: Tensor, class_names: Sequence[str]) -> str:
    """BLAKE2 of some pictures of a split, with their labels and the names of the classes, in their order.

    Args:
        pictures: the split.
        indices: (n,) int64, which of them.
        class_names: one a label.

    Returns:
        Of decoded pictures the digest of their content, of files that of their names (class and file), sizes and
        samples of their content: 64 hexadecimal digits, the same on every machine that holds the same pictures.

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
        prints = np.frombuffer(pictures.fingerprints, np.uint8).reshape(len(pictures), -1)[indices.numpy()]
        names = ["/".join(Path(pictures.paths[index]).parts[-2:]) for index in indices.tolist()]
        # In which version of this program the files were read, and how.
        how = [FILES_VERSION, pictures.image_size, pictures.reading.background, pictures.reading.bits]
        text = json.dumps([*head, *how, names, prints.tobytes().hex()])
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
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
                f"data.download: {request.name} could not be had in {root} ({reason(error)}); "
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
    size = f"{train.images.shape[3]}x{train.images.shape[2]}"
    how = "kept in memory"
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
        scaled = f"{request.image_size}x{request.image_size}"
        if scaled != size:
            how = f"scaled to {scaled}, {how}"
    mean, std = _channel_statistics(train.images)
    content = sha256(
        json.dumps([list(class_names), list(train.images.shape), list(test.images.shape)]).encode(),
        *(part.contiguous().numpy().data for split in (train, test) for part in (split.images, split.labels)),
    )
    _, channels, height, width = train.images.shape
    dataset = ImageDataset(
        request.name,
        tuple(class_names),
        train,
        test,
        channels,
        height,
        width,
        mean,
        std,
        content,
        pictures_digest(train, torch.arange(len(train)), class_names),
    )
    line = describe(
        request.name, len(train), len(test), len(class_names), size, is_grey=channels == 1, how=how
    )
    return replace(dataset, notes=(line,))


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
def _load_folder(request: _Request) -> ImageDataset:
    """Load `train/CLASS/*` and `test/CLASS/*` (or `val/CLASS/*`)."""
    survey = _survey(request)
    size = survey.side(request.image_size)
    survey.shape(request.image_size)  # refuses several sizes before any picture is decoded
    reading = survey.reading(request.background)
    if size is not None and size > SMALL_SIDE:
        return _file_dataset(request, survey, size, reading)
    listing, n = survey.listing, survey.listing.n_train
    images = torch.from_numpy(_cached_pictures(request, listing, reading))
    dataset = _array_dataset(
        request,
        listing.class_names,
        ArrayPictures(images[:n], listing.labels[:n]),
        ArrayPictures(images[n:], listing.labels[n:]),
    )
    return replace(dataset, reading=reading, notes=tuple(survey.notes(request.image_size, reading)))


def _survey(request: _Request) -> Survey:
    if request.root is None:
        raise ConfigError("data.root: not set; name the picture folder with --set data.root=DIR")
    return survey_folder(
        request.root,
        cache_dir=request.cache_dir,
        allow_left_out=request.allow_left_out,
        progress=request.checking,
    )


def _file_dataset(request: _Request, survey: Survey, size: int, reading: Reading) -> ImageDataset:
    """Describe a folder whose pictures stay in their files."""
    listing, n = survey.listing, survey.listing.n_train
    prints = survey.facts["fingerprint"]
    train, test = (
        FilePictures(listing.files[part], listing.labels[part], size, prints[part].tobytes(), reading)
        for part in (slice(n), slice(n, None))
    )
    digests = [pictures_digest(part, torch.arange(len(part)), listing.class_names) for part in (train, test)]
    return ImageDataset(
        name=request.name,
        class_names=listing.class_names,
        train=train,
        test=test,
        channels=3,
        height=size,
        width=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        digest=sha256(json.dumps(digests).encode()),
        train_digest=digests[0],
        reading=reading,
        notes=tuple(survey.notes(request.image_size, reading)),
    )


def _cached_pictures(request: _Request, listing: Listing, reading: Reading) -> NDArray[np.uint8]:
    """Return the decoded folder (N, C, H, W), from the cache if that was made of the folder as it is now."""
    state = f"{_CACHE_VERSION} {request.image_size} {reading} {listing.state}"
    file = cache_file(request.cache_dir, listing.root, "pictures", request.image_size)
    images = read_cache(file, state)
    if images is None:
        images = decode_pictures(listing.files, request.image_size, reading, request.progress)
        write_cache(file, state, images)
    return images


DATASETS: Mapping[str, Callable[[_Request], ImageDataset]] = {
    "digits": _load_digits,
    **dict.fromkeys(_TORCHVISION, _load_torchvision),
    "folder": _load_folder,
}
"""The data sets by name."""
