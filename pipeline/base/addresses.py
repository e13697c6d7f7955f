"""Addresses of storage and of databases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from istanas.buckets import SCHEMES, is_address
from istanas.errors import ConfigError
from pipeline.base.redaction import without_secrets

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}


def checked_address(text: str) -> str:
    """Return a normalised location of run directories, as `runtime.runs_dir` takes it.

    Raises:
        ConfigError: It is neither a folder nor an address of a known kind, or it contains credentials.

    Example:
        >>> checked_address("runs"), checked_address("s3://bucket/runs/")
        ('runs', 's3://bucket/runs')
    """
    shown = f"{without_secrets(text)!r:.60}"
    scheme, separator, _ = text.partition("://")
    if not separator:
        if text.startswith(tuple(f"{known}:" for known in (*SCHEMES, "file"))):
            raise ConfigError(f"{shown} is not an address", remedy="write two slashes after the colon")
        return text
    url = urlsplit(text)
    if scheme == "file":
        if url.netloc or not url.path:
            raise ConfigError(f"{shown} is not an address", remedy="write file:///PATH, with three slashes")
        return text
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{shown} is not an address of a known kind",
            remedy="give a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH",
        )
    if without_secrets(text) != text:
        raise ConfigError(
            f"{shown} contains a password or key", remedy=f"set it in the environment: {CREDENTIALS[scheme]}"
        )
    parts = names_in(url)
    if not url.netloc or any(part in ("", ".", "..") or "/" in part for part in parts) or url.fragment:
        raise ConfigError(f"{shown} is not an address", remedy=f"write {scheme}://BUCKET/PREFIX")
    return joined_address(url.scheme, [url.netloc, *parts], url.query)


def names_in(url: SplitResult) -> list[str]:
    """Return the names in an address, without percent-encoding."""
    path = url.path.strip("/")
    return [unquote(part) for part in path.split("/")] if path else []


def joined_address(scheme: str, names: Sequence[str], query: str) -> str:
    """Return the address of these names, the inverse of `names_in`. The first name is the bucket."""
    return f"{scheme}://{'/'.join(map(quote, names))}{'?' if query else ''}{query}"


def is_remote(text: str) -> bool:
    """Return whether an address names object storage, for which runs also have a local copy.

    Example:
        >>> is_remote("s3://bucket/runs"), is_remote("runs"), is_remote("file:///mnt/runs")
        (True, False, False)
    """
    return is_address(text)


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store's file; None for any other store.

    Example:
        >>> str(sqlite_file("sqlite:////data/mlflow.db")), sqlite_file("http://host:5000")
        ('/data/mlflow.db', None)
    """
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(path).absolute()
