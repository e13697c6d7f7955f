"""Made-up records of epochs and checkpoints of them, for tests of how they are kept."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from istanas.search import Freezing, NodeReport
from istanas.space import CellSpace, random_genotype
from pipeline.runs.checkpoint import serialize
from pipeline.training.epoch_record import EpochRecord, FolderStore, Progress, Rollback, SearchRecord


def record_of(epoch: int, space: CellSpace | None = None, *, one_stage: bool = False) -> EpochRecord:
    """The record of an epoch of a search, in which every node keeps other operations in every epoch.

    Args:
        epoch: from 1; decides all figures.
        space: the cells.
        one_stage: whether the record is of a one-stage search.
    """
    space, draw = space or CellSpace(n_nodes=1), np.random.default_rng(epoch)

    def nodes(changed: bool) -> tuple[NodeReport, ...]:
        found = []
        for cell in ("normal", "reduce"):
            for node in range(space.n_nodes):
                z = np.abs(draw.normal(size=space.n_candidates(node))) + 1e-6
                picks = [space.split(int(i)) for i in np.argsort(-z)[:2]]
                found.append(
                    NodeReport(
                        cell=cell,
                        node=node,
                        picks=[f"{space.ops[op]}<-{state}" for state, op in picks],
                        edge_weights=draw.normal(size=2).tolist(),
                        distance=float(changed),
                        gap=1e-12,
                        truncation=0.1,
                        changed=changed,
                        converged=True,
                        magnitudes=z.tolist(),
                        solver="homotopy",
                    )
                )
        return tuple(found)

    genotype = random_genotype(epoch, space).to_json()
    return EpochRecord(
        epoch=epoch,
        timestamp_ms=1_700_000_000_000 + epoch,
        seconds=0.1 * epoch,
        workers=1,
        metrics={"train/loss": 1 / epoch, "valid/top1": 1 / 3, "recovery/gap": 1e-12},
        rollbacks=(Rollback(reason="the loss is nan", lr_factor=0.5),) if epoch == 3 else (),
        search=SearchRecord(
            start_nodes=nodes(False) if epoch == 1 else (),
            nodes=nodes(True),
            trained_genotype=genotype,
            genotype=genotype,
            frozen=(Freezing("normal", 0, 1, "tolerance"),) if one_stage else None,
        ),
    )


def save_epoch(
    folder: Path | FolderStore, progress: Progress, record: EpochRecord | None = None, /, **state: Any
) -> Progress:
    """Write an epoch's line and checkpoint as a worker does.

    Args:
        folder: of the checkpoints, or the store that keeps them.
        progress: before the epoch.
        record: of the epoch; None: a made-up one.
        state: what else the checkpoint holds.

    Returns:
        The progress after it.
    """
    record = record or record_of(progress.epochs + 1)
    after, line = progress.after(record)
    data = serialize({**state, "progress": after.to_state()})
    store = FolderStore(folder) if isinstance(folder, Path) else folder
    store.write(record.epoch, data, line, progress.log.offset)
    return after


def as_version_0_1(record: EpochRecord) -> dict[str, Any]:
    """The record as version 0.1 kept it, in the list "history" of every checkpoint."""
    found = asdict(record)
    search = found.pop("search")
    if not found["rollbacks"]:
        del found["rollbacks"]
    if search is None:
        return found
    if not search["start_nodes"]:
        del search["start_nodes"]
    for key in ("converged",) if search["frozen"] is not None else ("searching", "rejection", "frozen"):
        del search[key]
    return {**found, **{key: list(v) if isinstance(v, tuple) else v for key, v in search.items()}}
