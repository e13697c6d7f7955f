"""Addresses of storage and of databases: which kinds there are, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pipeline.base.redaction import without_secrets

SCHEMES = ("s3", "gs")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}


# ---------- addresses and paths
def checked_address(text: str) -> str:
    """A place for run directories, as `runtime.runs_dir` takes it.

    Raises:
        ValueError: it is no folder and no address of a known kind, or holds what belongs into the environment.

    Example:
        >>> checked_address("runs"), checked_address("s3://bucket/runs/")
        ('runs', 's3://bucket/runs')
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        if text.startswith(tuple(f"{known}:" for known in (*SCHEMES, "file"))):
            raise ValueError("write two slashes after the colon of an address")
        return text
    url = urlsplit(text)
    if scheme == "file":
        if url.netloc or not url.path:
            raise ValueError("write file:///PATH, with three slashes")
        return text
    if scheme not in SCHEMES:
        raise ValueError("give a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH")
    if without_secrets(text) != text:
        raise ValueError(
            f"no passwords or keys in an address, set them in the environment: {CREDENTIALS[scheme]}"
        )
    parts = names_in(url)
    if not url.netloc or any(part in ("", ".", "..") or "/" in part for part in parts) or url.fragment:
        raise ValueError(f"write {scheme}://BUCKET/PREFIX")
    return joined_address(url.scheme, [url.netloc, *parts], url.query)


def names_in(url: SplitResult) -> list[str]:
    """The names in an address, as they are: there, what means something in addresses is written with a per cent."""
    path = url.path.strip("/")
    return [unquote(part) for part in path.split("/")] if path else []


def joined_address(scheme: str, names: Sequence[str], query: str) -> str:
    """The opposite of `names_in`; the first name is the bucket."""
    return f"{scheme}://{'/'.join(map(quote, names))}{'?' if query else ''}{query}"


def is_remote(text: str) -> bool:
    """Whether an address is one of a storage that is not worked on directly.

    Example:
        >>> is_remote("s3://bucket/runs"), is_remote("runs"), is_remote("file:///mnt/runs")
        (True, False, False)
    """
    return text.partition("://")[0] in SCHEMES and "://" in text


def sqlite_file(uri: str) -> Path | None:
    """The absolute path of a SQLite store's file; None for every other store.

    Example:
        >>> str(sqlite_file("sqlite:////data/mlflow.db")), sqlite_file("http://host:5000")
        ('/data/mlflow.db', None)
    """
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(path).absolute()
