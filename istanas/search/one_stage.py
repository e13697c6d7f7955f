"""One-stage ISTA-NAS: search and training of the target network in a single run, on a sparse supernet of its size.

While a node is ACTIVE its code is recovered after each epoch; it is FROZEN once its code rests. When all nodes are
frozen the architecture is fixed. After one more epoch at the full learning rate the search has ended, and the same
network trains on under a falling learning rate.

No I/O: the caller brings batches and stores what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.measure import Cost
from istanas.nets import NodeCode, NodeState, Supernet
from istanas.search.state import (
    Place,
    Recovered,
    RecoveryReport,
    SearchState,
)
from istanas.settings import CLOSING_EPOCHS, OneStageSettings
from istanas.space import CELLS, Genotype, genotype_from_supports
from istanas.training import (
    BatchLike,
    Compute,
    Metrics,
    Observer,
    Totals,
    clip_gradients,
    cross_entropy,
    evaluate,
    learning_rate,
    set_learning_rate,
    warmup_factor,
)

MAX_REDRAWS = 100  # of b, for a first architecture within the limits


@dataclass(frozen=True)
class Freezing:
    """When and why a node was frozen: "tolerance" (its code rested) or "limit" (of the search's epochs)."""

    cell: str
    node: int
    epoch: int  # epochs done
    reason: str


class OneStageSearch(SearchState):
    """The state of a search and its steps.

    Args:
        supernet: of the target network's size, with `op_batchnorm`, on its device; its compressed alphas are
            initialised here.
        settings: see `OneStageSettings`.
        compute: device and precision.
        seed: of the compressed alphas.
        cost: parameters and multiply-adds of a genotype's target network, which the limits are about.
        ranks: who searches with this process; None: nobody.

    Raises:
        ConfigError: if neither the first random start nor 100 others keep the limits.

    Example:
        >>> import torch
        >>> from istanas.space import CellSpace
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 3, 10, op_batchnorm=True)
        >>> settings = OneStageSettings(max_search_epochs=1, train_epochs=1)
        >>> search = OneStageSearch(net, settings, Compute(torch.device("cpu")), 0, lambda genotype: Cost(1, 1))
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], n_steps=1).count, len(search.recover().nodes)
        (2, 4)
        >>> search.is_searching, search.search_epochs, search.is_done
        (False, 2, False)

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020, section 3.4.
    """

    kind = "one_stage"

    def __init__(
        self,
        supernet: Supernet,
        settings: OneStageSettings,
        compute: Compute,
        seed: int,
        cost: Callable[[Genotype], Cost],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(supernet, settings, compute, seed, ranks)
        self.settings = settings
        self.cost = cost
        self.freezings: list[Freezing] = []
        self.n_rejected = 0  # proposals, after the first accepted one
        self.first_recovery = self._first_recovery(seed)

    def _first_recovery(self, seed: int) -> RecoveryReport:
        """Draw b until the architecture that it stands for keeps the limits."""
        rejection = None
        for attempt in range(MAX_REDRAWS + 1):
            if attempt > 0:
                self.draw_alphas(seed, attempt)
            recovered = self.recover_codes(self.places)
            rejection = self._rejection(recovered)
            if rejection is None:
                self.install({new.place: new.code for new in recovered})
                return RecoveryReport(self.report(recovered))
        raise ConfigError(
            f"{rejection}: nor do {MAX_REDRAWS} other random first architectures keep the limits, raise them or "
            "lower init_channels or layers"
        )

    @property
    def is_searching(self) -> bool:
        """Whether a node is still ACTIVE."""
        return bool(self.active_places())

    @property
    def search_epochs(self) -> int | None:
        """How many epochs the search takes, the closing one included; None while a node is ACTIVE."""
        if self.is_searching:
            return None
        return max(freezing.epoch for freezing in self.freezings) + CLOSING_EPOCHS

    @property
    def is_done(self) -> bool:
        """Whether the architecture is fixed and trained."""
        return (
            self.search_epochs is not None and self.epoch >= self.search_epochs + self.settings.train_epochs
        )

    def active_places(self) -> list[Place]:
        """The (cell, node) that are still ACTIVE."""
        states = self.supernet.node_states
        return [(c, n) for c, n in self.places if states[c][n] is NodeState.ACTIVE]

    def trained_epochs(self, epoch: float) -> float:
        """Epochs of the training after the search that are done after `epoch` epochs in all; 0 during the search."""
        return 0.0 if self.search_epochs is None else max(epoch - self.search_epochs, 0.0)

    def learning_rate(self, epoch: float) -> float:
        """The weights' learning rate after `epoch` epochs in all, the finished share of the current one included."""
        s = self.settings
        warmup = warmup_factor(epoch, s.warmup_epochs, s.schedule)
        # With train_epochs = 0 the rate stays at lr; max avoids a division by zero.
        falling = learning_rate(
            s.lr, s.lr_min, self.trained_epochs(epoch), max(s.train_epochs, 1), schedule=s.schedule
        )
        return warmup * falling

    def train_epoch(
        self,
        batches: Iterable[BatchLike],
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> Metrics:
        """One epoch: every batch updates the weights and, of ACTIVE nodes, the compressed alphas.

        Args:
            batches: see `istanas.data.Batch`, on the device.
            n_steps: their number.
            observe: called after every step.
            lr_factor: of the weights' learning rate, where an earlier attempt diverged.

        Returns:
            Mean loss (without the auxiliary head's) and accuracies, over the pictures of all ranks; the running
            statistics of batch norm are then the means over the ranks.
        """
        s = self.settings
        self.supernet.train()
        self.supernet.drop_path_prob = s.drop_path * self.trained_epochs(self.epoch) / max(s.train_epochs, 1)
        totals = Totals(self.compute.device)
        for step, batch in enumerate(batches):
            rate = self.learning_rate(self.epoch + step / n_steps)
            set_learning_rate(self.weight_optimizer, lr_factor * rate)
            self.step(batch, totals)
            if observe is not None:
                observe(step + 1, totals)
        self.ranks.average(self.supernet.active_buffers())
        self.epoch += 1
        return totals.metrics(self.ranks)

    def step(self, batch: BatchLike, totals: Totals) -> None:
        """One SGD step on the active weights and one Adam step on the active alphas, of the same gradient."""
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
        self.alpha_optimizer.step()  # a frozen b has no gradient, which Adam skips
        totals.add(loss, logits, target)

    def validate(self, batches: Iterable[BatchLike]) -> Metrics:
        """Loss and accuracies of the architecture just trained, eval mode, over the pictures of all ranks."""
        return evaluate(self.supernet.eval(), batches, self.compute, self.ranks)

    def recover(self) -> RecoveryReport:
        """Recover the ACTIVE nodes' codes, take them over if the architecture keeps the limits, freeze what rests.

        All nodes' new codes make one proposal. One that breaks a limit is rejected: the codes of before stay. A node
        whose new code is within the tolerance of its last accepted one freezes in either case, as published; after a
        rejection it keeps the accepted code. When the search's epochs are over, all nodes freeze.

        Returns:
            All nodes: what they keep now, and of those that were ACTIVE the certificates of what was proposed.

        Raises:
            IstanasError: if the ranks end with different architectures.
        """
        active = self.active_places()
        recovered = self.recover_codes(active)
        rejection = self._rejection(recovered)
        codes = self.codes_by_place()
        if rejection is None:
            codes.update({new.place: new.code for new in recovered})
        else:
            self.n_rejected += 1
        self._install_and_freeze(codes, {new.place: new.distance for new in recovered})
        resting = [place for place in self.places if place not in active]
        nodes = {(n.cell, n.node): n for n in [*self.report(recovered), *self.report_resting(resting)]}
        return RecoveryReport([nodes[place] for place in self.places], rejection)

    def _rejection(self, recovered: Sequence[Recovered]) -> str | None:
        """Why the architecture with these new codes is too large, if it is."""
        supports = {cell: [code.support for code in codes] for cell, codes in self.codes.items()}
        if not supports:
            supports = {cell: [()] * self.supernet.space.n_nodes for cell in CELLS}
        for new in recovered:
            cell, node = new.place
            supports[cell][node] = new.code.support
        cost = self.cost(genotype_from_supports(self.supernet.space, supports))
        for value, limit, name, unit in (
            (cost.params, self.settings.max_params, "max_params", "parameters"),
            (cost.macs, self.settings.max_macs, "max_macs", "multiply-adds"),
        ):
            if limit is not None and value > limit:
                return f"{value:,} {unit} are above {name} = {limit:,}"
        return None

    def _install_and_freeze(self, codes: Mapping[Place, NodeCode], distances: Mapping[Place, float]) -> None:
        """Install the codes; freeze the ACTIVE nodes within the tolerance, and at the last epoch all.

        A node whose b the epoch did not train, because no cell of its kind was live, does not freeze by the tolerance.

        Args:
            codes: of every node.
            distances: of every ACTIVE node's new code to its last accepted one.
        """
        states = {cell: list(self.supernet.node_states[cell]) for cell in CELLS}
        trained = {id(b) for b in self.supernet.active_alphas()}
        for (cell, node), distance in distances.items():
            was_trained = id(self.supernet.node_alphas(cell)[node]) in trained
            rests = was_trained and distance <= self.settings.termination_tol
            if rests or self.epoch >= self.settings.max_search_epochs:
                states[cell][node] = NodeState.FROZEN
                self.freezings.append(Freezing(cell, node, self.epoch, "tolerance" if rests else "limit"))
        self.install(codes, states)

    def _wrap(self) -> None:
        net = self.supernet
        self._forward = self.ranks.data_parallel(
            net.forward_with_auxiliary, [*net.active_parameters(), *net.active_alphas()]
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit for bit."""
        return {
            **super().state_dict(),
            "freezings": [asdict(freezing) for freezing in self.freezings],
            "n_rejected": self.n_rejected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: for a checkpoint of another kind or version.
        """
        super().load_state_dict(state)
        self.freezings = [Freezing(**freezing) for freezing in state["freezings"]]
        self.n_rejected = int(state["n_rejected"])
