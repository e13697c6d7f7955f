"""Release of the reservations (placement groups) on a cluster that a killed process of a run left behind.

Ray releases the reservations of a dead job, except those that its controller makes while the job ends. These would
remain until the cluster stops. Therefore, a run directory records the Ray jobs that executed the run, with their
clusters.
"""

from __future__ import annotations

import json
from pathlib import Path

from istanas.limits import RECORD_BYTES, read_at_most
from pipeline.base.files import atomic_write

JOBS_FILE = "jobs.json"  # [[session name of the cluster, Ray's job id], ...]


def release_leftovers(logs: Path) -> int:
    """Release what earlier processes of a run reserved on this cluster, and record the current Ray job.

    The caller must have locked the run, so that the earlier processes have certainly ended.

    Args:
        logs: The run's folder for Ray's logs.

    Returns:
        The number of released reservations.
    """
    import ray
    from ray.util.placement_group import placement_group_table

    context = ray.get_runtime_context()
    session, job = context.get_session_name(), context.get_job_id()
    jobs = _read(logs / JOBS_FILE)
    ours = {j for s, j in jobs if s == session and j != job and len(j) == len(job)}
    # The id of a reservation ends with the id of its job.
    left = [
        group
        for group, facts in placement_group_table().items()
        if facts["state"] != "REMOVED" and any(group.endswith(j) for j in ours)
    ]
    for group in left:
        release(group)
    if (session, job) not in jobs:
        here = [(s, j) for s, j in jobs if s == session]  # Jobs on other clusters are no longer needed.
        atomic_write(logs / JOBS_FILE, json.dumps([*here, (session, job)]))
    return len(left)


def release(reservation: str) -> None:
    """Release one reservation by its hexadecimal id. Releasing it again is safe."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(reservation))))


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        return [(str(session), str(job)) for session, job in json.loads(read_at_most(file, RECORD_BYTES))]
    except (OSError, ValueError, TypeError, RecursionError):  # A missing or damaged file releases nothing.
        return []
