"""The packages that only some commands need (the extras of pyproject.toml), and the error when one is missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from istanas.errors import IstanasError

RAY_DASHBOARD = ("aiohttp", "aiohttp_cors", "opencensus")
"""Modules that show that Ray's dashboard is installed. It has further ones, which are installed together with these."""

EXTRAS = {
    "clusters": (*RAY_DASHBOARD, "pathspec"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}
"""Modules of each extra."""


def check_extra(extra: str, field: str, modules: Sequence[str] | None = None) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: "clusters" or "export".
        field: The command or setting that requires the packages, for the error message.
        modules: The modules that are required; None for all of `EXTRAS`.

    Raises:
        IstanasError: One of the modules cannot be imported.

    Example:
        >>> try:
        ...     check_extra("export", field="--backend onnxruntime", modules=["no_such_package"])
        ... except IstanasError as error:
        ...     error.field, error.remedy
        ('--backend onnxruntime', "run: pip install 'istanas[export]'")
    """
    for name in EXTRAS[extra] if modules is None else modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise IstanasError(
                f"package {name} cannot be used ({reason})",
                field=field,
                remedy=f"run: pip install 'istanas[{extra}]'",
            ) from None
