"""What became of a run, as people call it: MLflow knows FINISHED, FAILED and KILLED only, a tag says the rest."""

from __future__ import annotations

from collections.abc import Mapping

OUTCOME_TAG = "istanas.outcome"
ORIGIN_TAG = "istanas.genotype_from"  # of a retraining: the run, the file, or the random or published cell
FOLDER_TAG = "istanas.data_folder"  # what own pictures are called, all of which are the data set "folder"
TRIAL_TAG = "istanas.trial_state"  # Optuna's word, of a trial of a sweep
INTERRUPTED = "INTERRUPTED"  # by Ctrl-C or a signal, or its process is gone: the same command resumes it
PRUNED = "PRUNED"  # a trial that was stopped early
_TOLD_APART = ("FAILED", "KILLED")


def outcome(status: str, tags: Mapping[str, str]) -> str:
    """Return a run's status as our tables and pages show it.

    Args:
        status: as MLflow and the record call it.
        tags: of the run; runs of before have no outcome, but trials have always had their state.

    Example:
        >>> interrupted = {"istanas.outcome": "INTERRUPTED"}
        >>> outcome("KILLED", {"istanas.trial_state": "PRUNED"}), outcome("FINISHED", interrupted)
        ('PRUNED', 'FINISHED')
    """
    if status not in _TOLD_APART:
        return status
    if tags.get(TRIAL_TAG) == PRUNED:
        return PRUNED
    return INTERRUPTED if tags.get(OUTCOME_TAG) == INTERRUPTED else status


def data_of(tags: Mapping[str, str]) -> str | None:
    """Return what the data set of a run in MLflow is called: its name, own pictures by their folder.

    Example:
        >>> data_of({"istanas.dataset": "folder", "istanas.data_folder": "pets-cats-0a1b2c"})
        'pets-cats-0a1b2c'
    """
    return tags.get(FOLDER_TAG, tags.get("istanas.dataset"))


def shown_outcome(found: str) -> str:
    """Return an outcome with what can be done about it.

    Example:
        >>> shown_outcome("INTERRUPTED"), shown_outcome("PRUNED")
        ('INTERRUPTED, resumable', 'PRUNED')
    """
    return f"{found}, resumable" if found == INTERRUPTED else found
