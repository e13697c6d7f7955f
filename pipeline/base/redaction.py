"""Removal of passwords and tokens from addresses before they are shown or stored."""

import re

# Everything up to the last @ before a slash. A password may also contain a slash, unless HOST:PORT/ precedes it.
_CREDENTIALS = re.compile(r"://(?:[^/\s]*@|(?![^/@\s]*:\d+/)[^/:@\s]*:\S*@)")
_SECRET = re.compile(
    r"([?&;][\w.-]*(?:pass|pwd|token|secret|key|auth|sig|credential|odbc_connect)[\w.-]*=)[^&;#\s]*",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """Return a text without the passwords and tokens of the addresses in it.

    Example:
        >>> without_secrets("sweep.storage=postgresql://me:se/cr@t@host/db?password=secret&sslmode=require")
        'sweep.storage=postgresql://host/db?password=...&sslmode=require'
        >>> without_secrets("http://me:hun@ter@host:1/a@b"), without_secrets("http://host:1/a@b")
        ('http://host:1/a@b', 'http://host:1/a@b')
        >>> without_secrets("sqlite:////home/a@b/mlflow.db")
        'sqlite:////home/a@b/mlflow.db'
    """
    return _SECRET.sub(r"\1...", _CREDENTIALS.sub("://", text))
