"""Short texts for people: counts, percentages, durations, settings, and errors on one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipeline.base.redaction import without_secrets


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "worker"), count(2, "thread")
        ('1 worker', '2 threads')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage.

    Example:
        >>> percent(0.98607)
        '98.61 %'
    """
    return f"{100 * fraction:.2f} %"


def rounded(fraction: float) -> str:
    """Return a fraction as a whole percentage.

    Example:
        >>> rounded(0.98607)
        '99 %'
    """
    return f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """Return a duration in a readable form.

    Example:
        >>> duration(7.31), duration(83), duration(3 * 3600 + 125)
        ('7.3 s', '1 min 23 s', '3 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def shown_value(value: Any) -> str:
    """Return a swept value as YAML writes it.

    Example:
        >>> shown_value(None), shown_value(["skip_connect", "sep_conv_3x3"]), shown_value(0.5)
        ('null', '[skip_connect, sep_conv_3x3]', '0.5')
    """
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return "null" if value is None else str(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name of each key in tables and figures: its last part, or the whole key if keys share their last part.

    Args:
        keys: The keys of a sweep's space.

    Example:
        >>> short_names(["search.lr", "retrain.lr", "space.sparsity"])
        {'search.lr': 'search.lr', 'retrain.lr': 'retrain.lr', 'space.sparsity': 'sparsity'}
    """
    last = {key: key.rpartition(".")[2] for key in keys}
    shared = Counter(last.values())
    return {key: name if shared[name] == 1 else key for key, name in last.items()}


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an error as one line without passwords. If an error of the system is its cause, return that one's message.

    Args:
        error: The error. Its causes are searched for an error of the system.
        limit: Number of characters after which the text is cut, >= 1.

    Example:
        >>> one_line(ValueError("no\\n  route to http://me:secret@host"))
        'ValueError: no route to http://host'
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            file = f": {link.filename}" if isinstance(link.filename, str) else ""
            return f"{type(link).__name__}: {link.strerror}{file}"
        link = link.__cause__ or link.__context__
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '...'}"


def last_line(error: BaseException | str) -> str:
    """Return the last line of an error's text, which names the error in a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.200}"
