"""Outcomes of runs. MLflow only has FINISHED, FAILED and KILLED; a tag distinguishes the others."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.runs.tags import Tag

INTERRUPTED = "INTERRUPTED"  # stopped by Ctrl-C or a signal, or killed; the same command resumes it
PRUNED = "PRUNED"  # a trial that was stopped early
_WITH_DETAILS = ("FAILED", "KILLED")


def outcome(status: str, tags: Mapping[str, str]) -> str:
    """Return a run's status as tables and pages show it.

    Args:
        status: The status in MLflow and in the record.
        tags: The tags of the run. Old runs lack the tag for the outcome, but trials always have their state.

    Example:
        >>> interrupted = {"istanas.outcome": "INTERRUPTED"}
        >>> outcome("KILLED", {"istanas.trial_state": "PRUNED"}), outcome("FINISHED", interrupted)
        ('PRUNED', 'FINISHED')
    """
    if status not in _WITH_DETAILS:
        return status
    if tags.get(Tag.TRIAL_STATE) == PRUNED:
        return PRUNED
    return INTERRUPTED if tags.get(Tag.OUTCOME) == INTERRUPTED else status


def data_of(tags: Mapping[str, str]) -> str | None:
    """Return the label of the data set of a run in MLflow: its name, or the label of a picture folder.

    Example:
        >>> data_of({"istanas.dataset": "folder", "istanas.data_folder": "pets-cats-0a1b2c"})
        'pets-cats-0a1b2c'
    """
    return tags.get(Tag.FOLDER, tags.get(Tag.DATASET))


def shown_outcome(found: str) -> str:
    """Return an outcome, marked if the run can be resumed.

    Example:
        >>> shown_outcome("INTERRUPTED"), shown_outcome("PRUNED")
        ('INTERRUPTED, resumable', 'PRUNED')
    """
    return f"{found}, resumable" if found == INTERRUPTED else found
