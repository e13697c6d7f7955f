"""What may be shown and written: addresses without the passwords and tokens in them."""

import re

# Of an address with an authority, not of a file's: up to the last @, because a password may hold anything.
_CREDENTIALS = re.compile(r"://(?!/)\S*@")
_SECRET = re.compile(
    r"([?&;][\w.-]*(?:pass|pwd|token|secret|key|auth|sig|credential|odbc_connect)[\w.-]*=)[^&;#\s]*",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A text without the passwords and tokens of the addresses in it.

    Example:
        >>> without_secrets("sweep.storage=postgresql://me:se/cr@t@host/db?password=secret&sslmode=require")
        'sweep.storage=postgresql://host/db?password=...&sslmode=require'
        >>> without_secrets("sqlite:////home/a@b/mlflow.db")
        'sqlite:////home/a@b/mlflow.db'
    """
    return _SECRET.sub(r"\1...", _CREDENTIALS.sub("://", text))
