"""The survey of a picture folder: the facts in the headers of its pictures, and the properties that they share.

Every decision that depends on the pictures as a whole is made here, before any picture is decoded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from istanas.data.cache import read_cache, sha256, write_cache
from istanas.data.folders import Listing, count_of, list_folder
from istanas.data.pool import DEFAULT_POOL, Pool, Progress
from istanas.data.reading import (
    Broken,
    DecodeSettings,
    Facts,
    Flag,
    inspect_picture,
    shown,
    unequal,
    unreadable,
)
from istanas.data.request import DATA_ROOT, GivenFolder
from istanas.errors import DataError
from istanas.limits import SMALL_SIDE

DEFAULT_IMAGE_SIZE = 224
"""Default side in pixels to which large pictures are scaled."""

_FACTS_VERSION = 2
FACTS = np.dtype(
    [
        *(("width", "<u4"), ("height", "<u4"), ("peak", "<u2"), ("level", "<u2")),
        *(("flags", "u1"), ("fingerprint", "u1", (8,))),
    ]
)
"""Record of the facts about a picture, see `Facts`."""

BRIGHTEST_SHARE = 0.01
"""The brightest training pictures are ignored, up to this share, when the number of bits is determined."""


@dataclass(frozen=True, eq=False)
class Survey:
    """The facts in the headers of all pictures of a folder.

    Args:
        listing: The folder.
        facts: (N,) records of width, height, peak, level, flags and fingerprint, see `Facts`.
    """

    listing: Listing
    facts: NDArray[np.void]

    @property
    def is_large(self) -> bool:
        """Return whether more than half of the training pictures are large."""
        train = self.facts[: self.listing.n_train]
        return 2 * int((np.maximum(train["width"], train["height"]) > SMALL_SIDE).sum()) > len(train)

    def side(self, image_size: int | None) -> int | None:
        """Return the side in pixels to which pictures are scaled; None keeps their size."""
        if image_size is None and self.is_large:
            return DEFAULT_IMAGE_SIZE
        return image_size

    def decode_settings(self, background: tuple[int, int, int]) -> DecodeSettings:
        """Return how the pixels are decoded; the training pictures determine the number of bits of grey pictures.

        This is the smallest number of bits, at least 8, that can represent the levels (see `Facts`) of all deep
        training pictures except the brightest 1 %.

        Raises:
            DataError: If the levels of more than half of the deep test pictures need more bits.
        """
        train, test = np.split(self.facts, [self.listing.n_train])
        levels = np.sort(train["level"][_has(train, Flag.DEEP)])
        decisive = len(levels) - 1 - int(BRIGHTEST_SHARE * len(levels))
        bits = max(int(levels[decisive]).bit_length(), 8) if len(levels) > 0 else 8
        deep = _has(test, Flag.DEEP)
        above = deep & (test["level"] >= 1 << bits)
        if 2 * int(above.sum()) > int(deep.sum()):
            path = self.listing.files[self.listing.n_train + int(above.argmax())]
            raise DataError(
                f"{shown(path)} has values up to {test['peak'][int(above.argmax())]:,}, and "
                f"{count_of(int(above.sum()), 'test picture')} in all above the {bits} bits "
                f"(0 to {(1 << bits) - 1:,}) of the training pictures",
                field=self.listing.given.field,
                remedy="scale both splits to one range",
            )
        return DecodeSettings(background, bits)

    def shape(self, image_size: int | None) -> tuple[int, int]:
        """Return (height, width) of the pictures as a network receives them.

        Args:
            image_size: See `side`.

        Raises:
            DataError: If unscaled pictures differ in size. It names the first whose size is not the most common one.
        """
        side = self.side(image_size)
        if side is not None:
            return side, side
        sizes = [(int(w), int(h)) for w, h in zip(self.facts["width"], self.facts["height"], strict=True)]
        counted = Counter(sizes[: self.listing.n_train])
        (common, _), *_ = counted.most_common(1)
        for path, size in zip(self.listing.files, sizes, strict=True):
            if size != common:
                raise unequal(path, size, common, self.listing.given.field)
        return common[1], common[0]

    def notes(self, image_size: int | None, settings: DecodeSettings) -> Iterator[str]:
        """Yield lines for the user: the folder's content, and unusual properties of its pictures."""
        listing, side = self.listing, self.side(image_size)
        how = "as they are" if side is None else f"scaled and cropped to {side}x{side}"
        is_in_memory = side is None or side <= SMALL_SIDE
        yield describe(
            listing.kind,
            listing.n_train,
            len(listing.paths) - listing.n_train,
            len(listing.class_names),
            self.sizes(),
            is_grey=self.is_grey(settings),
            how=f"{how}, {'kept in memory' if is_in_memory else f'read from {listing.read_from} in every epoch'}",
        )
        for left_out in listing.left_out:
            yield f"left out: {left_out}"
        red, green, blue = settings.background
        kept = (
            "values 0 to 255 are kept as they are"
            if settings.bits == 8
            else f"the upper 8 of the {settings.bits} bits that the training pictures use are kept"
        )
        for flag, what, text in (
            (
                Flag.TRANSPARENT,
                "transparency",
                f"composited over data.background #{red:02x}{green:02x}{blue:02x}",
            ),
            (Flag.DEEP, "more than 8 bits per channel", kept),
            (Flag.SEVERAL_FRAMES, "several frames", "only the first is read"),
        ):
            yield from self._note_on(_has(self.facts, flag), what, text)
        largest = (1 << settings.bits) - 1
        what = f"values above {largest:,}, the largest of {settings.bits} bits"
        yield from self._note_on(self.facts["peak"] > largest, what, "such pixels become white")

    def _note_on(self, mask: NDArray[np.bool_], what: str, text: str) -> Iterator[str]:
        """Yield a line about the pictures that a mask selects, if there are any."""
        if mask.any():
            verb = "has" if mask.sum() == 1 else "have"
            example = shown(self.listing.files[int(mask.argmax())])
            yield f"{count_of(int(mask.sum()), 'picture')} {verb} {what}, such as {example}: {text}"

    def is_grey(self, settings: DecodeSettings) -> bool:
        """Return whether all decoded pictures are grey."""
        grey = _has(self.facts, Flag.GREY)
        if len(set(settings.background)) > 1:
            grey &= ~_has(self.facts, Flag.TRANSPARENT)
        return bool(grey.all())

    def sizes(self) -> str:
        """Return the range of the pictures' sizes as text, such as "12x10 to 640x480"."""
        areas = self.facts["width"].astype(np.int64) * self.facts["height"]
        ends = [self.facts[index] for index in (int(areas.argmin()), int(areas.argmax()))]
        smallest, largest = (f"{end['width']}x{end['height']}" for end in ends)
        return smallest if smallest == largest else f"{smallest} to {largest}"


def describe(
    name: str, n_train: int, n_test: int, n_classes: int, sizes: str, *, is_grey: bool, how: str
) -> str:
    """Return a one-line description of a data set.

    Args:
        name: The data set.
        n_train, n_test: Numbers of pictures.
        n_classes: Number of classes.
        sizes: Original sizes of the pictures.
        is_grey: Whether all pictures are grey.
        how: How they are preprocessed and stored.

    Example:
        >>> describe("digits", 1438, 359, 10, "8x8", is_grey=True, how="kept in memory")
        'digits: 1,438 training and 359 test pictures of 10 classes, 8x8 pixels, grey, kept in memory'
    """
    return (
        f"{name}: {n_train:,} training and {n_test:,} test pictures of {n_classes} classes, {sizes} pixels, "
        f"{'grey' if is_grey else 'colour'}, {how}"
    )


def survey_folder(
    root: Path,
    *,
    cache_dir: Path,
    allow_left_out: bool,
    progress: Progress | None,
    test_fraction: float = 0.0,
    keep: bool = True,
    pool: Pool = DEFAULT_POOL,
    given: GivenFolder = DATA_ROOT,
) -> Survey:
    """List a picture folder and read the header of every picture.

    Args:
        root: The folder.
        cache_dir: Folder in which the facts are cached.
        allow_left_out: Whether more than `LEFT_OUT_SHARE` of a class may be left out.
        progress: Called with (headers read, pictures in total).
        test_fraction: See `list_folder`.
        keep: Whether new facts are written to the cache.
        pool: How the work is distributed over processes.
        given: How error messages name the folder.

    Raises:
        DataError: If the folder, or a picture in it, cannot be used.
    """
    listing = list_folder(root, allow_left_out=allow_left_out, test_fraction=test_fraction, given=given)
    state = f"{_FACTS_VERSION} {listing.state}"
    file = cache_file(cache_dir, listing.place, "facts")
    cached = read_cache(file, state)
    if cached is not None and cached.shape == (len(listing.paths), FACTS.itemsize):
        return Survey(listing, cached.reshape(-1).view(FACTS))
    facts = _inspect_all(listing.files, progress, pool, given)
    if keep:
        write_cache(file, state, facts.view(np.uint8).reshape(len(facts), FACTS.itemsize))
    return Survey(listing, facts)


def cache_file(cache_dir: Path, place: str, kind: str, *settings: object) -> Path:
    """Return the cache file for one kind of data under the given settings.

    Args:
        cache_dir: The folder of the cache.
        place: Where the pictures lie, see `Listing.place`.
        kind: The suffix of the file.
        settings: The settings.
    """
    key = sha256(json.dumps([place, *settings]).encode())
    return cache_dir / f"folder-{key[:16]}.{kind}"


def _inspect_all(
    files: Sequence[str], progress: Progress | None, pool: Pool, given: GivenFolder
) -> NDArray[np.void]:
    """Read the headers of all pictures, and return (N,) records.

    Raises:
        DataError: If pictures are broken. It names the first one and their number.
    """
    facts: list[NDArray[np.void]] = []
    broken: list[Broken] = []
    done = 0
    for chunk, (known, lost) in pool.map(_inspect_chunk, files):
        facts.append(known)
        broken += lost
        done += len(chunk)
        if progress is not None:
            progress(done, len(files))
    if broken:
        raise unreadable(broken[0], more=len(broken) - 1, field=given.field)
    return np.concatenate(facts)


def _inspect_chunk(paths: Sequence[str]) -> tuple[NDArray[np.void], list[Broken]]:
    found = [inspect_picture(path) for path in paths]
    records = [
        (*each[:5], np.frombuffer(each.fingerprint, np.uint8)) for each in found if isinstance(each, Facts)
    ]
    return np.array(records, dtype=FACTS), [each for each in found if isinstance(each, Broken)]


def _has(facts: NDArray[np.void], flag: Flag) -> NDArray[np.bool_]:
    """Return which pictures have a flag: (N,) bools."""
    return (facts["flags"] & int(flag)) > 0
