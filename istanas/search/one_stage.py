"""One-stage ISTA-NAS: search and training of the target network in one run, on a sparse supernet of the same size.

While a node is ACTIVE its code is recovered after each epoch. It becomes FROZEN when its code stops moving. When all
nodes are frozen the architecture is fixed. The search ends after one more epoch at the full learning rate. The training
of the same network then continues with a falling learning rate.

This module does no I/O: the caller passes batches and stores the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from istanas.data import Batch
from istanas.errors import ConfigError
from istanas.nets import NodeCode, NodeState
from istanas.search.base import Batches, Place, RecoveryReport
from istanas.search.sparse_coding import Recovered, SparseCodingSearch
from istanas.settings import CLOSING_EPOCHS, OneStageSettings
from istanas.training import (
    BatchLike,
    Metrics,
    Observer,
    Totals,
    clip_gradients,
    cross_entropy,
    learning_rate,
    set_learning_rate,
    warmup_factor,
)

MAX_REDRAWS = 100  # Largest number of redraws of b until the first architecture is within the limits.


@dataclass(frozen=True)
class Freezing:
    """When and why a node froze.

    Args:
        cell: The kind of the decision: "normal" or "reduce" in the DARTS space.
        node: Index of the decision among those of its kind, >= 0.
        epoch: Number of completed epochs, >= 1.
        reason: "tolerance" if its code stopped moving, "limit" if the search reached `max_search_epochs`.
    """

    cell: str
    node: int
    epoch: int
    reason: str


class OneStageSearch(SparseCodingSearch[OneStageSettings]):
    """A one-stage search: its state, its steps and its epochs.

    Args:
        supernet: The network on its device. It has the target network's size and `op_batchnorm`. Its compressed alphas
            are initialised here.
        settings: Hyperparameters of the search.
        compute: Device and precision.
        seed: Seed of the compressed alphas.
        ranks: The processes that search together; `None` means only this one.
        cost: Returns the parameters and multiply-adds of a genotype's target network, which are compared with the
            limits; `None` if the settings have no limits.
        candidate_costs: See `Search`.

    Raises:
        ConfigError: If neither the first random architecture nor 100 others are within the limits.

    Example:
        >>> import torch
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 3, 10, op_batchnorm=True)
        >>> settings = OneStageSettings(max_search_epochs=1, train_epochs=1, max_params=None)
        >>> search = OneStageSearch(net, settings, Compute(torch.device("cpu")), 0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], None, n_steps=1).count, len(search.recover().nodes)
        (2, 4)
        >>> search.is_searching, search.search_epochs, search.is_done
        (False, 2, False)

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020, section 3.4.
    """

    kind = "one_stage"

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        self.begin_coding()
        self.freezings: list[Freezing] = []
        if self.settings.over_limit == "reweigh":
            self.limits.check()
        self.n_rejected = 0  # Number of rejected architectures after the first accepted one.
        return self._first_recovery(self.seed)

    def _first_recovery(self, seed: int) -> RecoveryReport:
        """Draw b until its architecture is within the limits."""
        for attempt in range(MAX_REDRAWS + 1):
            if attempt > 0:
                self.draw_alphas(seed, attempt)
            recovered = self._recovered(self.places)
            excess = self.excess(recovered)
            if excess is None:
                self.install({new.place: new.code for new in recovered})
                return RecoveryReport(self.report(recovered))
        assert excess is not None
        raise ConfigError(
            f"{excess.text}, and {MAX_REDRAWS} other random first architectures exceed the limits, too",
            field=excess.limit,
            remedy="raise it, or lower init_channels or layers",
        )

    @property
    def is_searching(self) -> bool:
        """Whether any node is ACTIVE."""
        return bool(self.active_places())

    @property
    def search_epochs(self) -> int | None:
        """Number of epochs of the search, including the closing one, or `None` while a node is ACTIVE."""
        if self.is_searching:
            return None
        return max(freezing.epoch for freezing in self.freezings) + CLOSING_EPOCHS

    @property
    def is_done(self) -> bool:
        """Whether the architecture is fixed and its training is complete."""
        return (
            self.search_epochs is not None and self.epoch >= self.search_epochs + self.settings.train_epochs
        )

    def active_places(self) -> list[Place]:
        """Return the ACTIVE nodes as (cell, node)."""
        states = self.supernet.node_states
        return [(c, n) for c, n in self.places if states[c][n] is NodeState.ACTIVE]

    def trained_epochs(self, epoch: float) -> float:
        """Return how many of the first `epoch` epochs belong to the training after the search."""
        return 0.0 if self.search_epochs is None else max(epoch - self.search_epochs, 0.0)

    def learning_rate(self, epoch: float) -> float:
        """Return the weights' learning rate after `epoch` epochs in total, which may be a fraction."""
        s = self.settings
        warmup = warmup_factor(epoch, s.warmup_epochs, s.schedule)
        # With train_epochs = 0 the rate stays at lr. `max` avoids a division by zero.
        falling = learning_rate(
            s.lr, s.lr_min, self.trained_epochs(epoch), max(s.train_epochs, 1), schedule=s.schedule
        )
        return warmup * falling

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Batches | None,
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> Metrics:
        """Run one epoch: every batch updates the weights, and the compressed alphas of ACTIVE nodes.

        Afterwards the running statistics of batch norm are averaged over the ranks.

        Args:
            weight_batches: Batches on the device, see `istanas.data.Batch`.
            alpha_batches: Not used.
            n_steps: Number of batches, >= 1.
            observe: Called after every step.
            lr_factor: Factor of the weights' learning rate, > 0; below 1 after a divergence.

        Returns:
            Mean loss (without that of the auxiliary head) and accuracies, over the pictures of all ranks.
        """
        s = self.settings
        self.supernet.train()
        self.supernet.drop_path_prob = s.drop_path * self.trained_epochs(self.epoch) / max(s.train_epochs, 1)
        totals = Totals(self.compute.device)
        for step, batch in enumerate(weight_batches):
            rate = self.learning_rate(self.epoch + step / n_steps)
            set_learning_rate(self.weight_optimizer, lr_factor * rate)
            self.step(batch, totals)
            if observe is not None:
                observe(step + 1, totals)
        self.ranks.average(self.supernet.active_buffers())
        self.epoch += 1
        return totals.metrics(self.ranks)

    def step(self, batch: BatchLike, totals: Totals) -> None:
        """Run one SGD step on the active weights and one Adam step on the active alphas, after one backward pass."""
        images, target, weight = Batch(*batch)
        with self.compute.autocast():
            logits, auxiliary = self._forward(images)
        s = self.settings
        loss = total = cross_entropy(logits, target, s.label_smoothing)
        if auxiliary is not None:
            total = loss + s.auxiliary_weight * cross_entropy(auxiliary, target, s.label_smoothing)
        self.weight_optimizer.zero_grad(set_to_none=True)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        (total * weight).backward()
        clip_gradients(self.supernet.active_parameters(), s.grad_clip)
        self.weight_optimizer.step()
        self.alpha_optimizer.step()  # Adam skips the b of frozen nodes, which have no gradient.
        totals.add(loss, logits, target)

    def train_step(self, batch: BatchLike, alpha_batch: BatchLike | None) -> None:
        """Run one step of an epoch, to measure its time."""
        self.step(batch, Totals(self.compute.device))

    @property
    def trained(self) -> tuple[int, int] | None:
        """(completed, total) epochs of the training of the fixed architecture; `None` before its beginning."""
        if self.search_epochs is None:
            return None
        return self.epoch - self.search_epochs, self.settings.train_epochs

    def metrics(self) -> dict[str, float]:
        """Return the numbers of frozen nodes and of rejected architectures."""
        return {
            "arch/frozen_nodes": float(len(self.freezings)),
            "arch/rejected": float(self.n_rejected),
            **self.cost_metrics(),
        }

    def finish_epoch(self) -> RecoveryReport:
        """Recover the codes of ACTIVE nodes, see `recover`."""
        return self.recover()

    def recover(self) -> RecoveryReport:
        """Recover the codes of ACTIVE nodes, install them if the architecture is within the limits, and freeze nodes.

        The new codes of all nodes are accepted or rejected together. If the architecture exceeds a limit, they are
        rejected and the previous codes are kept. As published, a node freezes in both cases if its new code is within
        the tolerance of its last accepted one; after a rejection it keeps the accepted code. After `max_search_epochs`
        epochs all nodes freeze.

        Returns:
            The kept operations of all nodes, and the certificates of the new codes of those that were ACTIVE.

        Raises:
            SolverError: If no solver certifies the code of a node.
            IstanasError: If the ranks have different architectures.
        """
        active = self.active_places()
        recovered = self._recovered(active)
        excess = self.excess(recovered)
        codes = self.codes_by_place()
        if excess is None:
            codes.update({new.place: new.code for new in recovered})
        else:
            self.n_rejected += 1
        self._install_and_freeze(codes, {new.place: new.distance for new in recovered})
        frozen = [place for place in self.places if place not in active]
        nodes = {(n.cell, n.node): n for n in [*self.report(recovered), *self.report_frozen(frozen)]}
        return RecoveryReport(
            [nodes[place] for place in self.places], None if excess is None else excess.text
        )

    def _recovered(self, places: Sequence[Place]) -> list[Recovered]:
        """Recover new codes of these nodes; with over_limit = reweigh, within the limits if possible."""
        if self.settings.over_limit == "reweigh":
            return self.recover_within_limits(places)
        return self.recover_codes(places)

    def _install_and_freeze(self, codes: Mapping[Place, NodeCode], distances: Mapping[Place, float]) -> None:
        """Install the codes, and freeze the ACTIVE nodes within the tolerance, or all of them after the last epoch.

        A node does not freeze by the tolerance if the epoch did not train its b, because no cell of its kind was live.

        Args:
            codes: The code of every node.
            distances: For every ACTIVE node, the distance of its new code to its last accepted one.
        """
        states = {kind: list(each) for kind, each in self.supernet.node_states.items()}
        trained = {id(b) for b in self.supernet.active_alphas()}
        for (cell, node), distance in distances.items():
            was_trained = id(self.supernet.node_alphas(cell)[node]) in trained
            is_within = was_trained and distance <= self.settings.termination_tol
            if is_within or self.epoch >= self.settings.max_search_epochs:
                states[cell][node] = NodeState.FROZEN
                self.freezings.append(Freezing(cell, node, self.epoch, "tolerance" if is_within else "limit"))
        self.install(codes, states)

    def _wrap(self) -> None:
        net = self.supernet
        self._forward = self.ranks.data_parallel(
            net.forward_with_auxiliary, [*net.active_parameters(), *net.active_alphas()]
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        return {
            **super().state_dict(),
            "freezings": [asdict(freezing) for freezing in self.freezings],
            "n_rejected": self.n_rejected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        self.freezings = [Freezing(**freezing) for freezing in state["freezings"]]
        self.n_rejected = int(state["n_rejected"])
