"""Objects in a bucket (`s3://` or `gs://`), accessed with pyarrow's file systems, as Ray does."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote, urlsplit

SCHEMES = ("s3", "gs")


def is_address(text: str) -> bool:
    """Return whether a text is the address of a bucket, and not a path.

    Example:
        >>> is_address("s3://bucket/shards"), is_address("shards")
        (True, False)
    """
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in SCHEMES


def file_system(address: str) -> tuple[Any, str]:
    """Return pyarrow's file system for an address, and the path in it.

    The path is not taken from pyarrow, which interprets some characters of a name as parts of the address.

    Args:
        address: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`, with percent-encoded names.

    Raises:
        ValueError: If pyarrow rejects the address.
        TypeError: If pyarrow rejects a parameter of the address.
    """
    from pyarrow.fs import FileSystem

    url = urlsplit(address)
    query = url.query
    if url.scheme == "s3" and "allow_delayed_open" not in query:
        # With it, a small object is written in one request instead of three.
        query = "&".join(filter(None, [query, "allow_delayed_open=true"]))
    system, _ = FileSystem.from_uri(f"{url.scheme}://{quote(url.netloc)}{'?' if query else ''}{query}")
    names = [unquote(part) for part in url.path.strip("/").split("/") if part]
    return system, "/".join([url.netloc, *names])
