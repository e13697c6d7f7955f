"""Places on a cluster that a killed sitting of a run still holds are given back by the next one.

Ray frees what a dead job has reserved, but not what its controller reserves while the job dies: those cores would be
gone for as long as the cluster lives. A run directory therefore remembers as which jobs, of which cluster, it ran.
"""

from __future__ import annotations

import json
from pathlib import Path

from istanas.limits import RECORD_BYTES, read_at_most
from pipeline.base.files import atomic_write

JOBS_FILE = "jobs.json"  # [[session of the cluster, Ray's job id], ...]


def free_leftovers(logs: Path) -> int:
    """Give back what earlier sittings of a run have reserved on this cluster, and remember the present one.

    Call it with the run's lock held: then the earlier sittings are dead, whatever they still hold.

    Args:
        logs: folder of the run for what concerns Ray.

    Returns:
        How many reservations were given back.
    """
    import ray
    from ray.util.placement_group import placement_group_table

    context = ray.get_runtime_context()
    session, job = context.get_session_name(), context.get_job_id()
    jobs = _read(logs / JOBS_FILE)
    ours = {j for s, j in jobs if s == session and j != job and len(j) == len(job)}
    # A reservation's id ends with that of the job that made it.
    left = [
        group
        for group, facts in placement_group_table().items()
        if facts["state"] != "REMOVED" and any(group.endswith(j) for j in ours)
    ]
    for group in left:
        free(group)
    if (session, job) not in jobs:
        here = [(s, j) for s, j in jobs if s == session]  # other clusters are history
        atomic_write(logs / JOBS_FILE, json.dumps([*here, (session, job)]))
    return len(left)


def free(reservation: str) -> None:
    """Give back one reservation, by its id (hexadecimal); one that is no more stays so."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(reservation))))


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        return [(str(session), str(job)) for session, job in json.loads(read_at_most(file, RECORD_BYTES))]
    except (OSError, ValueError, TypeError, RecursionError):  # none yet, or a damaged one: it only helps
        return []
