"""Two-stage ISTA-NAS: alternate alpha and weight steps on a sparse supernet, and recover the codes after each epoch.

This module does no I/O: the caller passes batches and stores the results.
"""

from __future__ import annotations

from istanas.search.alternating import AlternatingSearch
from istanas.search.base import RecoveryReport
from istanas.search.sparse_coding import SparseCodingSearch
from istanas.settings import TwoStageSettings


class TwoStageSearch(AlternatingSearch[TwoStageSettings], SparseCodingSearch[TwoStageSettings]):
    """A two-stage search: its state, its steps and its epochs.

    Args:
        supernet, settings, compute, seed, ranks, cost: See `Search`.

    Example:
        >>> import torch
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 2, 10)
        >>> search = TwoStageSearch(net, TwoStageSettings(epochs=1), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> len(search.recover().nodes)
        4

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020.
    """

    kind = "two_stage"

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        self.begin_coding()
        self.limits.check()
        return self.recover()

    def recover(self) -> RecoveryReport:
        """Recover every node's code from its b, and make the operations of its largest entries active.

        Rank 0 recovers the codes for all ranks. The architecture is within the limits, see `recover_within_limits`.

        Returns:
            The changes and each node's certificate. Distances are 0 at the first recovery.

        Raises:
            SolverError: If no solver certifies the code of a node.
            IstanasError: If the ranks have different architectures.
        """
        recovered = self.recover_within_limits(self.places)
        self.install({new.place: new.code for new in recovered})
        return RecoveryReport(self.report(recovered))

    def finish_epoch(self) -> RecoveryReport:
        """Recover the codes, see `recover`."""
        return self.recover()

    def has_converged(self, report: RecoveryReport) -> bool:
        """Return whether every code moved by at most `termination_tol` in the last epoch."""
        tol = self.settings.termination_tol
        return tol is not None and all(node.distance <= tol for node in report.nodes)

    def metrics(self) -> dict[str, float]:
        """Return the weight of the costs, and the number of frozen nodes: 0, nodes freeze in one-stage search only."""
        return {"arch/frozen_nodes": 0.0, **self.cost_metrics()}
