"""One picture file: what its header says, and its pixels as 8 bits per channel, upright and opaque."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from istanas.data.cache import reason
from istanas.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = frozenset(
    {
        *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)

# What Pillow may take a file for, whatever its suffix says: PostScript, say, would start another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

CHUNK = 500  # pictures that a pool process reads at a time: some 50 ms of work, 1.5 MB of result
POOL_FROM = 4 * CHUNK  # below this many pictures, starting processes costs more than it saves

_BLOCK = 16 * 1024  # bytes of a sample of a large file
_WHOLE = 4 * _BLOCK  # files up to this size are read whole
_PADDING = b"\0\r\n\t "  # what programs append to a file that is complete
_HOLE = bytes(512)  # a sector of zeros, which compressed data hardly ever contain
_STRAY_SHARE = 0.001  # of a picture's pixels, at least one: the brightest, such as a camera's hot pixels
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION, _ORIENTATIONS, _SIDEWAYS = 0x0112, range(1, 9), (5, 6, 7, 8)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """How the pixels of a file become 8 bits per channel; a trained network needs the same again.

    Args:
        background: (red, green, blue) in 0..255, over which transparent pictures are composited.
        bits: 8..16. The values of grey pictures that are stored with more than 8 bits are taken for numbers of this
            many bits: the upper 8 of these bits are kept, and larger values become 255.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    bits: int = 16


PLAIN = Reading()
"""How pictures without transparency and with 8 bits are read, whatever the settings."""


class Flag(IntFlag):
    """What a picture's header tells beside its size."""

    TRANSPARENT = 1
    DEEP = 2
    SEVERAL_FRAMES = 4
    GREY = 8


class Facts(NamedTuple):
    """What is known of a picture file before its pixels are used.

    Args:
        width: in pixels, upright.
        height: in pixels, upright.
        peak: largest value of a grey picture with more than 8 bits; 0 of others.
        level: likewise, the largest value without the brightest 0.1 % of the pixels (at least one).
        flags: see `Flag`.
        fingerprint: 8 bytes, a digest of the file's size and of samples of its content; all of it up to 64 KiB.
    """

    width: int
    height: int
    peak: int
    level: int
    flags: int
    fingerprint: bytes


@dataclass(frozen=True)
class Broken:
    """A picture file that cannot be used, why, and what to do; "" replaces or deletes it."""

    path: str
    why: str
    remedy: str = ""

    @classmethod
    def by(cls, path: str, error: Exception) -> Broken:
        """Return what an error says of a file; errors themselves cannot always be sent by a process."""
        return cls(path, reason(error), error.remedy if isinstance(error, _UnfitError) else "")


class _UnfitError(ValueError):
    """Says why a complete picture cannot be used, and what to do about it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


def inspect_picture(path: str) -> Facts | Broken:
    """Read a picture's header and check that the file is complete and can be read without a loss.

    Files of up to 64 KiB are decoded, and so are larger ones whose header and end leave a doubt.

    Args:
        path: the file.

    Returns:
        Its facts, or what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            samples = _samples(file, size)
            # A small file has been read already, which on a disk across the network costs more than all the rest.
            source = io.BytesIO(samples[0]) if size <= _WHOLE else file
            with opened(source) as picture:
                return _facts(picture, source, samples, size)
    except Exception as error:  # broken files raise anything: OSError, SyntaxError, struct.error ...
        return Broken.by(path, error)


def _facts(picture: Image.Image, file: BinaryIO, samples: Sequence[bytes], size: int) -> Facts:
    _check_depth(picture)
    flags, peak, level = Flag(0), 0, 0
    if picture.has_transparency_data:
        flags |= Flag.TRANSPARENT
    if _is_grey(picture):
        flags |= Flag.GREY
    # The second picture of an MPO is the brightness or the depth of the first, as telephones store it in JPEG files.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        flags |= Flag.SEVERAL_FRAMES
    width, height = picture.size
    if _may_lie_sideways(picture, samples) and _orientation(picture) in _SIDEWAYS:
        width, height = height, width
    surely_complete = _check_end(picture, file, samples, size)
    if _is_deep(picture):
        flags |= Flag.DEEP
        peak, level = _peak_and_level(np.asarray(picture))
    elif size <= _WHOLE or not surely_complete:
        picture.load()
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    for sample in samples:
        digest.update(sample)
    return Facts(width, height, peak, level, int(flags), digest.digest())


def _peak_and_level(values: NDArray[Any]) -> tuple[int, int]:
    """The largest value of a picture, with and without its brightest pixels, see `Facts`."""
    stray = min(max(1, int(_STRAY_SHARE * values.size)), values.size - 1)
    place = values.size - 1 - stray
    return int(values.max()), int(np.partition(values, place, axis=None)[place])


def read_picture(path: str, reading: Reading = PLAIN) -> tuple[Image.Image, bool]:
    """Decode a picture file to RGB, upright and opaque.

    Args:
        path: the file.
        reading: how transparent and deep pixels are read.

    Returns:
        (the picture, whether it is grey).

    Raises:
        DataError: whatever is wrong with the file, Pillow's limit on decompression bombs included.

    Example:
        >>> read_picture("no.png")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        istanas.errors.DataError: data.root: no.png is no readable picture (No such file or directory); ...
    """
    from PIL import Image

    try:
        with open(path, "rb") as file, opened(file) as picture:
            _check_depth(picture)
            deep, grey, mode = _is_deep(picture), _is_grey(picture), picture.mode
            upright = _upright(picture)
            if deep:
                values = np.asarray(upright) >> (reading.bits - 8)
                return Image.fromarray(np.minimum(values, 255).astype(np.uint8)).convert("RGB"), True
            if upright.has_transparency_data:
                return _composited(upright, reading), grey and len(set(reading.background)) == 1
            return (upright if mode == "RGB" else upright.convert("RGB")), grey
    except Exception as error:  # broken files raise anything: OSError, SyntaxError, struct.error ...
        raise unreadable(Broken.by(path, error)) from error


@contextmanager
def opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture of at most as many pixels as Pillow takes for harmless: up to twice as many it only warns of.

    Args:
        file: open, not a path. Pillow maps an uncompressed file that it has opened by its path into memory, and
            shears the pixels of a TIFF that lies sideways.

    Raises:
        ValueError: if the file is empty or of no known format.
        Exception: whatever else Pillow raises for broken files.
    """
    from PIL import Image, UnidentifiedImageError

    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    with warnings.catch_warnings():
        # What Pillow warns of are metadata that programs have spoilt, which says nothing about the pixels.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:  # whose message shows this program's objects
            raise ValueError(f"its content is none of {', '.join(_FORMATS)}") from None
        with picture:
            _scale_transparent_value(picture)
            yield _alpha_of_bmp(picture, file) or picture


def _scale_transparent_value(picture: Image.Image) -> None:
    """Bring the transparent value of a grey PNG of 2 or 4 bits to the 8 bits to which Pillow scales its pixels."""
    factor = {"L;2": 85, "L;4": 17}.get(_raw_mode(picture))
    if picture.format == "PNG" and factor is not None and "transparency" in picture.info:
        picture.info["transparency"] *= factor


def _alpha_of_bmp(picture: Image.Image, file: BinaryIO) -> Image.Image | None:
    """The picture of a BMP file of 32 bits with its fourth channel; None if that holds nothing.

    Such a file does not say whether its fourth byte is alpha, and Pillow drops it. As other programs do, it is taken
    for alpha unless it is zero everywhere.
    """
    from PIL import Image

    if picture.format != "BMP" or picture.info.get("compression") != 0 or _raw_mode(picture) != "BGRX":
        return None
    (tile,) = _tiles(picture)
    file.seek(tile.offset)
    _, stride, direction = tile.args
    pixels = file.read(stride * picture.height)
    whole = Image.frombytes("RGBA", picture.size, pixels, "raw", "BGRA", stride, direction)
    return None if whole.getchannel("A").getextrema() in {(0, 0), (255, 255)} else whole


def in_pool(
    work: Callable[..., Result], chunks: Sequence[Sequence[str]], *arguments: object, pool: bool
) -> Iterator[Result]:
    """Yield `work(chunk, *arguments)` of the chunks in order, from a process for each core.

    Args:
        work: a function of a module.
        chunks: of paths.
        arguments: the same for every chunk.
        pool: False does it in this process.

    Raises:
        DataError: if a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not pool or cores == 1:
        yield from (work(chunk, *arguments) for chunk in chunks)
        return
    # Processes, because small pictures are mostly interpreter work, where threads only wait for one another.
    executor = ProcessPoolExecutor(min(cores, len(chunks)))
    try:
        yield from executor.map(work, chunks, *([argument] * len(chunks) for argument in arguments))
    except BrokenProcessPool as error:
        raise DataError("data.root: a decoding process was killed; free some memory and try again") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def decode_pictures(
    paths: Sequence[str], size: int | None, reading: Reading, progress: Progress | None
) -> NDArray[np.uint8]:
    """Decode all pictures to bytes.

    Args:
        paths: N files, at least one.
        size: of the square that they are brought to; None keeps theirs, which must be equal.
        reading: see `Reading`.
        progress: called with (pictures decoded, N).

    Returns:
        (N, C, H, W): one channel if every picture is grey, else three.

    Raises:
        DataError: for a broken picture, or one of another size than the others.
    """
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    images: NDArray[np.uint8] | None = None
    all_grey, done = True, 0
    for chunk, grey in in_pool(_decode_chunk, chunks, size, reading, pool=len(paths) >= POOL_FROM):
        if images is None:
            images = np.empty((len(paths), 3, *chunk.shape[1:3]), np.uint8)
        if chunk.shape[1:3] != images.shape[2:]:
            raise unequal(paths[done], _size(chunk.shape[1:]), _size(images.shape[2:]))
        images[done : done + len(chunk)] = chunk.transpose(0, 3, 1, 2)
        all_grey &= grey
        done += len(chunk)
        if progress is not None:
            progress(done, len(paths))
    assert images is not None
    return np.ascontiguousarray(images[:, :1]) if all_grey else images


def _decode_chunk(paths: Sequence[str], size: int | None, reading: Reading) -> tuple[NDArray[np.uint8], bool]:
    """Decode pictures to (n, H, W, 3) bytes, size x size if given; and tell whether all were grey."""
    from PIL import Image, ImageOps

    arrays: list[NDArray[np.uint8]] = []
    all_grey = True
    for path in paths:
        picture, grey = read_picture(path, reading)
        all_grey &= grey
        if size is not None and picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        array = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
        if arrays and array.shape != arrays[0].shape:
            raise unequal(path, _size(array.shape), _size(arrays[0].shape))
        arrays.append(array)
    return np.stack(arrays), all_grey


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed anywhere: what is not printable, or not UTF-8, is escaped.

    Example:
        >>> shown("caf\\udce9"), shown("café")
        ('caf\\\\udce9', 'café')
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def unreadable(broken: Broken, more: int = 0) -> DataError:
    """Name the picture that cannot be used, why, and what to do.

    Args:
        broken: the picture.
        more: how many others cannot be used either.
    """
    others = ""
    if more > 0:
        others = ", and " + ("one other is" if more == 1 else f"{more:,} others are") + " not either"
    remedy = broken.remedy or f"replace or delete {'it' if more == 0 else 'them'}"
    return DataError(
        f"data.root: {shown(broken.path)} is no readable picture ({broken.why}){others}; {remedy}"
    )


def unequal(path: str, size: tuple[int, int], others: tuple[int, int]) -> DataError:
    """Name the picture whose size is not that of the others.

    Args:
        path: of the picture.
        size: (width, height).
        others: likewise.
    """
    return DataError(
        f"data.root: {shown(path)} has {size[0]}x{size[1]} pixels, others have {others[0]}x{others[1]}; "
        f"bring all to one size with --set data.image_size={max(others)}"
    )


def _size(shape: Sequence[int]) -> tuple[int, int]:
    """(width, height) of an array (H, W, ...)."""
    return shape[1], shape[0]


def _samples(file: BinaryIO, size: int) -> list[bytes]:
    """A small file's content; of a large one its start, its middle and its end."""
    if size <= _WHOLE:
        return [file.read()]
    samples = []
    for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
        file.seek(start)
        samples.append(file.read(_BLOCK))
    file.seek(0)
    return samples


def _check_end(picture: Image.Image, file: BinaryIO, samples: Sequence[bytes], size: int) -> bool:
    """Check the end of a file, which is all that is looked at of most large ones.

    Returns:
        Whether the file is surely complete; if not, only decoding it can tell.

    Raises:
        ValueError: if the file is surely cut off or damaged, which decoders do not notice everywhere.
    """
    end = samples[-1]
    has_hole = any(_HOLE in sample for sample in samples)
    match picture.format:
        case "JPEG" | "MPO":
            # Cameras and telephones append data of their own, in which case the end must be searched for.
            if not end.rstrip(_PADDING).endswith(b"\xff\xd9") and not _has_end_of_jpeg(_content(file)):
                raise ValueError("it is cut off: a JPEG file ends with FF D9")
            return True
        case "PNG":
            if size <= _WHOLE or has_hole or b"IEND" not in end:
                _check_png(_content(file))
            return True
        case "WEBP":
            # Lossy pictures of one colour end with zeros, too, of at most a twelfth of the file.
            zeros = len(end) - len(end.rstrip(b"\0"))
            if size < int.from_bytes(samples[0][4:8], "little") + 8 or zeros > max(16, len(end) // 8):
                raise ValueError("it is cut off: the end of the WebP file is missing")
            return True
        case "GIF":
            return end.rstrip(b"\0").endswith(b";") and not has_hole
    tiles = _tiles(picture)
    return all(tile.codec_name == "raw" and size >= _end(picture, tile) for tile in tiles) and len(tiles) > 0


def _content(file: BinaryIO) -> bytes:
    """All bytes of a file, the position in which stays as it is: Pillow goes on reading from there."""
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content


def _has_end_of_jpeg(content: bytes) -> bool:
    """Whether the end mark follows the pixels: the thumbnail in the metadata before them has one of its own."""
    position = 2
    while content[position : position + 1] == b"\xff":
        marker = content[position + 1 : position + 2]
        if marker == b"\xda":  # start of scan: compressed pixels never contain FF D9
            return content.find(b"\xff\xd9", position) >= 0
        if marker == b"\xff":  # padding
            position += 1
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def _check_png(content: bytes) -> None:
    """Raise unless all chunks of a PNG file are there, and the checksums of those with pixels are right."""
    start, view = 8, memoryview(content)
    while (end := start + 12 + int.from_bytes(view[start : start + 4])) <= len(view):
        kind = content[start + 4 : start + 8]
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ValueError("it is damaged: the checksum of a PNG chunk is wrong")
        if kind == b"IEND":
            return
        start = end
    raise ValueError("it is cut off: the last chunk of a PNG file is IEND")


def _end(picture: Image.Image, tile: Any) -> int:
    """The byte at which an uncompressed part of a picture ends, or a later one."""
    left, top, right, bottom = tile.extents
    bits = 1 if picture.mode == "1" else 8 * len(picture.getbands())
    end: int = tile.offset + (right - left) * (bottom - top) * bits // 8
    return end


def _may_lie_sideways(picture: Image.Image, samples: Sequence[bytes]) -> bool:
    """Whether the orientation is worth asking for.

    Pillow turns TIFF pictures by itself, and their size with them. Of a PNG it decodes all pixels to answer.
    """
    if picture.format != "PNG":
        return picture.format != "TIFF"
    return any(mark in sample for mark in (b"eXIf", b"exif", b"xmp") for sample in (samples[0], samples[-1]))


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 (upright) of a picture without one."""
    try:
        found: Any = picture.getexif().get(_ORIENTATION)
    except Exception:  # metadata that programs have spoilt, which says nothing about the pixels
        return 1
    return int(found) if found in _ORIENTATIONS else 1


def _upright(picture: Image.Image) -> Image.Image:
    """A copy of a picture as it is seen."""
    from PIL import ImageOps

    picture.load()  # which turns TIFF pictures already
    copy, orientation = picture.copy(), _orientation(picture)
    if orientation == 1:
        return copy
    # Of the metadata the orientation alone: Pillow writes the rest back, and fails on what is odd in it.
    copy.info = {key: value for key, value in copy.info.items() if key == "transparency"}
    copy.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(copy)


def _is_deep(picture: Image.Image) -> bool:
    """Whether it is a grey picture with more than 8 bits; Pillow scales those of PGM files to 16 bits."""
    return picture.mode in _DEEP_MODES or (picture.mode == "I" and picture.format == "PPM")


def _is_grey(picture: Image.Image) -> bool:
    """Whether the pixels are grey, apart from the background of transparent ones."""
    return picture.mode in {"1", "L", "LA", "La"} or _is_deep(picture)


def _check_depth(picture: Image.Image) -> None:
    """Raise for pixels that Pillow would cut to 8 bits, or whose range is not known."""
    if _is_deep(picture):
        if "transparency" in picture.info:
            raise _UnfitError("16 bits with a transparent value", "scale such pictures to 8 bits")
        if picture.format == "TIFF" and _tag(picture, _PHOTOMETRIC) == 0:
            raise _UnfitError("16 bits of which 0 is white", "store such pictures with 0 as black")
        return
    if picture.mode in {"I", "F"}:
        raise _UnfitError(
            f"pixels of mode {picture.mode} have no fixed range", "scale such pictures to 8 or 16 bits"
        )
    if _bits(picture) > 8:
        raise _UnfitError(
            "colour or transparency with more than 8 bits per channel",
            "scale such pictures to 8 bits, by the range that all use",
        )


def _bits(picture: Image.Image) -> int:
    """Bits per channel as they are stored, more than 8 or not: Pillow's mode of the decoded picture does not say."""
    match picture.format:
        case "TIFF":
            bits = _tag(picture, _BITS_PER_SAMPLE)
            return max(bits) if isinstance(bits, tuple) else int(bits or 1)
        case "PPM":
            arguments = [tile.args for tile in _tiles(picture) if isinstance(tile.args, tuple)]
            return max((int(largest).bit_length() for _, largest, *_ in arguments), default=8)
        case "PNG":
            return 16 if ";16" in _raw_mode(picture) else 8
    return 8


def _tag(picture: Any, tag: int) -> Any:
    """The value of a tag of a TIFF file; None if it has none."""
    return picture.tag_v2.get(tag)


def _raw_mode(picture: Image.Image) -> str:
    """How the pixels lie in the file, in Pillow's words; "" if that is not told."""
    arguments = next((tile.args for tile in _tiles(picture)), None)
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _tiles(picture: Image.Image) -> Sequence[Any]:
    """What of the file is which part of the picture, as Pillow is going to decode it."""
    return getattr(picture, "tile", ())


def _composited(picture: Image.Image, reading: Reading) -> Image.Image:
    """Composite a picture with transparent parts over the background."""
    from PIL import Image

    background = Image.new("RGBA", picture.size, (*reading.background, 255))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
