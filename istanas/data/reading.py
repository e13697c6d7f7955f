"""Reading one picture file: the facts in its header, and its pixels as 8 bits per channel, upright and opaque."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from istanas.data.cache import reason
from istanas.data.pool import DEFAULT_POOL, Pool, Progress
from istanas.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = frozenset(
    {
        *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)

# Pillow may detect only these formats, whatever the suffix. Others are unsafe; PostScript would start Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_BLOCK = 16 * 1024  # size in bytes of a sample of a large file
_WHOLE = 4 * _BLOCK  # files up to this size are read completely
_PADDING = b"\0\r\n\t "  # bytes that some programs append to a complete file
_HOLE = bytes(512)  # a sector of zeros, which is rare in compressed data
_STRAY_SHARE = (
    0.001  # the brightest pixels, such as a camera's hot pixels, are ignored up to this share (at least one)
)
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION, _ORIENTATIONS, _SIDEWAYS = 0x0112, range(1, 9), (5, 6, 7, 8)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


@dataclass(frozen=True)
class DecodeSettings:
    """How the pixels of a file are converted to 8 bits per channel. A trained network requires the same settings.

    Args:
        background: (red, green, blue) in 0..255, over which transparent pictures are composited.
        bits: 8..16. The values of grey pictures that are stored with more than 8 bits are interpreted as numbers of
            this many bits: the upper 8 of these bits are kept, and larger values become 255.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    bits: int = 16

    def cache_key(self) -> str:
        """Return the text that identifies the settings in the state of a cache."""
        # The class was once called Reading; with another text, the caches of existing folders would be recomputed.
        return f"Reading(background={self.background!r}, bits={self.bits!r})"


DEFAULT_DECODING = DecodeSettings()
"""Default settings, for opaque pictures with 8 bits per channel. All settings decode those alike."""


class Flag(IntFlag):
    """Properties of a picture in its header, apart from its size."""

    TRANSPARENT = 1
    DEEP = 2
    SEVERAL_FRAMES = 4
    GREY = 8


class Facts(NamedTuple):
    """Facts about a picture file that are known before its pixels are used.

    Args:
        width: Width in pixels of the upright picture.
        height: Height in pixels of the upright picture.
        peak: Largest value of a grey picture with more than 8 bits; 0 for other pictures.
        level: As `peak`, but without the brightest 0.1 % of the pixels (at least one pixel).
        flags: See `Flag`.
        fingerprint: 8 bytes, a digest of the file's size and of samples of its content (up to 64 KiB: all of it).
    """

    width: int
    height: int
    peak: int
    level: int
    flags: int
    fingerprint: bytes


@dataclass(frozen=True)
class Broken:
    """A picture file that cannot be used.

    Args:
        path: The file.
        why: The reason.
        remedy: What to do; "" stands for replacing or deleting the file.
        is_absent: Whether there is no such file.
    """

    path: str
    why: str
    remedy: str = ""
    is_absent: bool = False

    @classmethod
    def by(cls, path: str, error: Exception) -> Broken:
        """Convert an error about a file. A process could not return the error itself, which may not be picklable."""
        is_absent = isinstance(error, FileNotFoundError) and not os.path.lexists(path)
        remedy = "correct its name, or restore it" if is_absent else ""
        return cls(path, reason(error), error.remedy if isinstance(error, _UnfitError) else remedy, is_absent)


class Content(bytes):
    """The content of a picture file, with the name that the picture has in messages.

    Args:
        content: The bytes.
        name: The name.

    Example:
        >>> picture = Content(b"GIF89a", "cat/1.gif")
        >>> len(picture), picture.name
        (6, 'cat/1.gif')
    """

    name: str

    def __new__(cls, content: bytes | memoryview, name: str) -> Content:
        """Create the content, which takes its bytes as every other bytes object does."""
        new = super().__new__(cls, content)
        new.name = name
        return new

    def __getnewargs__(self) -> tuple[bytes, str]:  # type: ignore[override]
        """Return the arguments with which pickle creates a copy."""
        return bytes(self), self.name


def name_of(source: str | bytes) -> str:
    """Return the name of a picture in messages: its path, or the name of its content."""
    return source if isinstance(source, str) else getattr(source, "name", "the content")


class _UnfitError(ValueError):
    """A complete picture that cannot be used, with a remedy."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


def inspect_picture(path: str) -> Facts | Broken:
    """Read a picture's header and check that the file is complete and can be decoded without loss.

    Files of up to 64 KiB are decoded. Larger ones are decoded only if their header and end do not prove them complete.

    Args:
        path: The file.

    Returns:
        Its facts, or the reason why it cannot be used.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _inspected(file, size)
    except Exception as error:  # broken files raise many types: OSError, SyntaxError, struct.error ...
        return Broken.by(path, error)


def inspect_content(content: bytes) -> Facts | Broken:
    """Return what `inspect_picture` returns for a file with this content."""
    try:
        return _inspected(io.BytesIO(content), len(content))
    except Exception as error:  # broken files raise many types: OSError, SyntaxError, struct.error ...
        return Broken.by(name_of(content), error)


def fingerprint_of(content: bytes) -> bytes:
    """Return the fingerprint of a file with this content, see `Facts`."""
    return _fingerprint(_samples(io.BytesIO(content), len(content)), len(content))


def _inspected(file: BinaryIO, size: int) -> Facts:
    samples = _samples(file, size)
    # A small file is not read a second time: on a network file system, reading dominates the cost.
    source = io.BytesIO(samples[0]) if size <= _WHOLE else file
    with opened(source) as picture:
        return _facts(picture, source, samples, size)


def _fingerprint(samples: Sequence[bytes], size: int) -> bytes:
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    for sample in samples:
        digest.update(sample)
    return digest.digest()


def _facts(picture: Image.Image, file: BinaryIO, samples: Sequence[bytes], size: int) -> Facts:
    _check_depth(picture)
    flags, peak, level = Flag(0), 0, 0
    if picture.has_transparency_data:
        flags |= Flag.TRANSPARENT
    if _is_grey(picture):
        flags |= Flag.GREY
    # Telephones store a gain map or depth map in a JPEG file as the second frame of an MPO.
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
    return Facts(width, height, peak, level, int(flags), _fingerprint(samples, size))


def _peak_and_level(values: NDArray[Any]) -> tuple[int, int]:
    """Return the largest value of a picture, with and without its brightest pixels, see `Facts`."""
    stray = min(max(1, int(_STRAY_SHARE * values.size)), values.size - 1)
    place = values.size - 1 - stray
    return int(values.max()), int(np.partition(values, place, axis=None)[place])


def read_picture(
    source: str | bytes,
    settings: DecodeSettings = DEFAULT_DECODING,
    reduction: Callable[[int, int], int] | None = None,
) -> tuple[Image.Image, bool]:
    """Decode a picture file to RGB, upright and opaque.

    Args:
        source: The path of the file, or its content.
        settings: How transparent and deep pixels are decoded.
        reduction: Called for a JPEG file with (width, height) of the upright picture. It returns 1, 2, 4 or 8, by which
            both sides of the decoded picture are divided, rounded up. Fewer pixels take less time and memory.

    Returns:
        (the picture, whether it is grey).

    Raises:
        DataError: If the file cannot be decoded, or exceeds Pillow's limit on decompression bombs.

    Example:
        >>> read_picture("no.png")
        Traceback (most recent call last):
        istanas.errors.DataError: data.root: no.png does not exist; correct its name, or restore it
    """
    from PIL import Image

    try:
        with (
            open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as file,
            opened(file) as picture,
        ):
            _check_depth(picture)
            if reduction is not None and picture.format in ("JPEG", "MPO"):
                _reduce(picture, reduction)
            deep, grey, mode = _is_deep(picture), _is_grey(picture), picture.mode
            upright = _upright(picture)
            if deep:
                values = np.asarray(upright) >> (settings.bits - 8)
                return Image.fromarray(np.minimum(values, 255).astype(np.uint8)).convert("RGB"), True
            if upright.has_transparency_data:
                return _composited(upright, settings), grey and len(set(settings.background)) == 1
            return (upright if mode == "RGB" else upright.convert("RGB")), grey
    except Exception as error:  # broken files raise many types: OSError, SyntaxError, struct.error ...
        raise unreadable(Broken.by(name_of(source), error)) from error


def _reduce(picture: Image.Image, reduction: Callable[[int, int], int]) -> None:
    """Let libjpeg decode a picture at a fraction of its size, see `read_picture`."""
    width, height = picture.size
    factor = reduction(height, width) if _orientation(picture) in _SIDEWAYS else reduction(width, height)
    picture.draft(None, (width // factor, height // factor))


def fit_picture(picture: Image.Image, size: int) -> Image.Image:
    """Scale the largest central square of a picture to size x size pixels, unless it has this size."""
    from PIL import Image, ImageOps

    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)


@contextmanager
def opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture, and reject it if it has more pixels than Pillow considers safe.

    Pillow itself only warns about pictures with up to twice that number.

    Args:
        file: An open file, not a path. Given a path, Pillow would map an uncompressed file into memory, and then
            distort the pixels of a rotated TIFF.

    Raises:
        ValueError: If the file is empty or its format is unknown.
        Exception: Other errors that Pillow raises for broken files.
    """
    from PIL import Image, UnidentifiedImageError

    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    with warnings.catch_warnings():
        # Pillow warns about damaged metadata, which do not affect the pixels.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:  # its message contains the repr of the file object
            raise ValueError(f"its content is none of {', '.join(_FORMATS)}") from None
        with picture:
            _scale_transparent_value(picture)
            yield _alpha_of_bmp(picture, file) or picture


def _scale_transparent_value(picture: Image.Image) -> None:
    """Scale the transparent value of a grey PNG of 2 or 4 bits to 8 bits, as Pillow scales the pixels."""
    factor = {"L;2": 85, "L;4": 17}.get(_raw_mode(picture))
    if picture.format == "PNG" and factor is not None and "transparency" in picture.info:
        picture.info["transparency"] *= factor


def _alpha_of_bmp(picture: Image.Image, file: BinaryIO) -> Image.Image | None:
    """Return the picture of a 32-bit BMP file with its fourth channel, or None if that channel is unused.

    Such a file does not say whether its fourth byte is alpha, and Pillow drops it. As in other programs, it is
    interpreted as alpha unless it is zero everywhere.
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


def decode_pictures(
    paths: Sequence[str | bytes],
    size: int | None,
    settings: DecodeSettings,
    progress: Progress | None,
    *,
    pool: Pool = DEFAULT_POOL,
) -> NDArray[np.uint8]:
    """Decode all pictures to bytes.

    Args:
        paths: N files, at least one: their paths, or their contents.
        size: Side of the square to which the pictures are scaled; None keeps their sizes, which must be equal.
        settings: How the pictures are decoded.
        progress: Called with (pictures decoded, N).
        pool: How the work is distributed over processes.

    Returns:
        (N, C, H, W): one channel if every picture is grey, else three.

    Raises:
        DataError: If a picture is broken, or its size differs from the others.
    """
    images: NDArray[np.uint8] | None = None
    all_grey, done = True, 0
    for _, (chunk, grey) in pool.map(_decode_chunk, paths, size, settings):
        if images is None:
            images = np.empty((len(paths), 3, *chunk.shape[1:3]), np.uint8)
        if chunk.shape[1:3] != images.shape[2:]:
            raise unequal(name_of(paths[done]), _size(chunk.shape[1:]), _size(images.shape[2:]))
        images[done : done + len(chunk)] = chunk.transpose(0, 3, 1, 2)
        all_grey &= grey
        done += len(chunk)
        if progress is not None:
            progress(done, len(paths))
    assert images is not None
    return np.ascontiguousarray(images[:, :1]) if all_grey else images


def _decode_chunk(
    paths: Sequence[str | bytes], size: int | None, settings: DecodeSettings
) -> tuple[NDArray[np.uint8], bool]:
    """Return the pictures as (n, H, W, 3) bytes, size x size if given, and whether all were grey."""
    arrays: list[NDArray[np.uint8]] = []
    all_grey = True
    for path in paths:
        picture, grey = read_picture(path, settings)
        all_grey &= grey
        if size is not None:
            picture = fit_picture(picture, size)
        array = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
        if arrays and array.shape != arrays[0].shape:
            raise unequal(name_of(path), _size(array.shape), _size(arrays[0].shape))
        arrays.append(array)
    return np.stack(arrays), all_grey


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path in a printable form: characters that are not printable or not UTF-8 are escaped.

    Example:
        >>> shown("caf\\udce9"), shown("café")
        ('caf\\\\udce9', 'café')
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def unreadable(broken: Broken, more: int = 0, field: str = "data.root") -> DataError:
    """Return the error for a picture that cannot be used.

    Args:
        broken: The picture.
        more: Number of other pictures that cannot be used either.
        field: The setting or argument that names the folder.
    """
    others = ""
    if more > 0:
        others = ", nor " + ("is one other" if more == 1 else f"are {more:,} others")
        if broken.is_absent:
            others = f", and {'one other' if more == 1 else f'{more:,} others'} cannot be read"
    problem = "does not exist" if broken.is_absent else f"is not a readable picture ({broken.why})"
    return DataError(
        f"{shown(broken.path)} {problem}{others}",
        field=field,
        remedy=broken.remedy or f"replace or delete {'it' if more == 0 else 'them'}",
    )


def unequal(path: str, size: tuple[int, int], others: tuple[int, int], field: str = "data.root") -> DataError:
    """Return the error for a picture whose size differs from the others.

    Args:
        path: The picture.
        size: Its (width, height).
        others: The (width, height) of the others.
        field: The setting or argument that names the folder.
    """
    return DataError(
        f"{shown(path)} has {size[0]}x{size[1]} pixels, others have {others[0]}x{others[1]}",
        field=field,
        remedy=f"scale all to one size with --set data.image_size={max(others)}",
    )


def _size(shape: Sequence[int]) -> tuple[int, int]:
    """Return (width, height) of an array with the shape (H, W, ...)."""
    return shape[1], shape[0]


def _samples(file: BinaryIO, size: int) -> list[bytes]:
    """Return a small file's content, or the start, middle and end of a large one."""
    if size <= _WHOLE:
        return [file.read()]
    samples = []
    for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
        file.seek(start)
        samples.append(file.read(_BLOCK))
    file.seek(0)
    return samples


def _check_end(picture: Image.Image, file: BinaryIO, samples: Sequence[bytes], size: int) -> bool:
    """Check the end of a file. For most large files, this is the only check.

    Returns:
        Whether the file is certainly complete; otherwise it must be decoded to find out.

    Raises:
        ValueError: If the file is certainly truncated or damaged, which decoders do not always notice.
    """
    end = samples[-1]
    has_hole = any(_HOLE in sample for sample in samples)
    match picture.format:
        case "JPEG" | "MPO":
            # Cameras and telephones append their own data, in which case the end mark must be searched for.
            if not end.rstrip(_PADDING).endswith(b"\xff\xd9") and not _has_end_of_jpeg(_content(file)):
                raise ValueError("it is truncated: a JPEG file ends with FF D9")
            return True
        case "PNG":
            if size <= _WHOLE or has_hole or b"IEND" not in end:
                _check_png(_content(file))
            return True
        case "WEBP":
            # Lossy pictures of one colour also end with zeros, which make up at most a twelfth of the file.
            zeros = len(end) - len(end.rstrip(b"\0"))
            if size < int.from_bytes(samples[0][4:8], "little") + 8 or zeros > max(16, len(end) // 8):
                raise ValueError("it is truncated: the end of the WebP file is missing")
            return True
        case "GIF":
            return end.rstrip(b"\0").endswith(b";") and not has_hole
    tiles = _tiles(picture)
    return all(tile.codec_name == "raw" and size >= _end(picture, tile) for tile in tiles) and len(tiles) > 0


def _content(file: BinaryIO) -> bytes:
    """Return all bytes of a file and restore the position, from which Pillow continues to read."""
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content


def _has_end_of_jpeg(content: bytes) -> bool:
    """Return whether an end mark follows the pixels. A thumbnail in the metadata before them has its own end mark."""
    position = 2
    while content[position : position + 1] == b"\xff":
        marker = content[position + 1 : position + 2]
        if marker == b"\xda":  # start of scan; compressed pixels never contain FF D9
            return content.find(b"\xff\xd9", position) >= 0
        if marker == b"\xff":  # padding
            position += 1
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def _check_png(content: bytes) -> None:
    """Check that all chunks of a PNG file are present and the checksums of the critical ones are correct."""
    start, view = 8, memoryview(content)
    while (end := start + 12 + int.from_bytes(view[start : start + 4])) <= len(view):
        kind = content[start + 4 : start + 8]
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ValueError("it is damaged: the checksum of a PNG chunk is wrong")
        if kind == b"IEND":
            return
        start = end
    raise ValueError("it is truncated: the last chunk of a PNG file is IEND")


def _end(picture: Image.Image, tile: Any) -> int:
    """Return an upper bound of the byte at which an uncompressed part of a picture ends."""
    left, top, right, bottom = tile.extents
    bits = 1 if picture.mode == "1" else 8 * len(picture.getbands())
    end: int = tile.offset + (right - left) * (bottom - top) * bits // 8
    return end


def _may_lie_sideways(picture: Image.Image, samples: Sequence[bytes]) -> bool:
    """Return whether the orientation must be read.

    Pillow rotates TIFF pictures and their size by itself. For a PNG, it decodes all pixels to find the orientation.
    """
    if picture.format != "PNG":
        return picture.format != "TIFF"
    return any(mark in sample for mark in (b"eXIf", b"exif", b"xmp") for sample in (samples[0], samples[-1]))


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation, 1..8; 1 (upright) for a picture without one."""
    try:
        found: Any = picture.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata do not affect the pixels
        return 1
    return int(found) if found in _ORIENTATIONS else 1


def _upright(picture: Image.Image) -> Image.Image:
    """Return an upright copy of a picture."""
    from PIL import ImageOps

    picture.load()  # this rotates TIFF pictures
    copy, orientation = picture.copy(), _orientation(picture)
    if orientation == 1:
        return copy
    # Only the orientation is kept: Pillow would write the other metadata back, and fails if they are malformed.
    copy.info = {key: value for key, value in copy.info.items() if key == "transparency"}
    copy.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(copy)


def _is_deep(picture: Image.Image) -> bool:
    """Return whether a picture is grey with more than 8 bits. Pillow scales such PGM files to 16 bits."""
    return picture.mode in _DEEP_MODES or (picture.mode == "I" and picture.format == "PPM")


def _is_grey(picture: Image.Image) -> bool:
    """Return whether the pixels are grey, apart from the background of transparent ones."""
    return picture.mode in {"1", "L", "LA", "La"} or _is_deep(picture)


def _check_depth(picture: Image.Image) -> None:
    """Raise an error if Pillow would truncate the pixels to 8 bits, or if their range is unknown."""
    if _is_deep(picture):
        if "transparency" in picture.info:
            raise _UnfitError("16 bits with a transparent value", "scale such pictures to 8 bits")
        if picture.format == "TIFF" and _tag(picture, _PHOTOMETRIC) == 0:
            raise _UnfitError("16 bits where 0 is white", "store such pictures with 0 as black")
        return
    if picture.mode in {"I", "F"}:
        raise _UnfitError(
            f"pixels of mode {picture.mode} have no fixed range", "scale such pictures to 8 or 16 bits"
        )
    if _bits(picture) > 8:
        raise _UnfitError(
            "colour or transparency with more than 8 bits per channel",
            "scale all such pictures to 8 bits with the same range",
        )


def _bits(picture: Image.Image) -> int:
    """Return the stored bits per channel, exact only above 8. The mode of a decoded picture does not show them."""
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
    """Return the value of a tag of a TIFF file, or None."""
    return picture.tag_v2.get(tag)


def _raw_mode(picture: Image.Image) -> str:
    """Return Pillow's name for the pixel layout in the file; "" if it is unknown."""
    arguments = next((tile.args for tile in _tiles(picture)), None)
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _tiles(picture: Image.Image) -> Sequence[Any]:
    """Return Pillow's table of the parts of the picture and their places in the file."""
    return getattr(picture, "tile", ())


def _composited(picture: Image.Image, settings: DecodeSettings) -> Image.Image:
    """Composite a picture with transparent parts over the background."""
    from PIL import Image

    background = Image.new("RGBA", picture.size, (*settings.background, 255))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
