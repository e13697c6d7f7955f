"""The base class of all searches: a network, two optimisers, the number of epochs, and a report after each epoch.

A search method derives its search from `Search`, or from `istanas.search.alternating.AlternatingSearch`, which trains
weights and alphas in turn.

The state of a search has no random generators, because all randomness of an epoch is derived from (seed, purpose,
epoch), see `istanas.training.derive_seed`. It has no learning rate either, because that is a function of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.errors import CheckpointError
from istanas.measure import Cost
from istanas.nets import NodeState, SearchNetwork
from istanas.nets.skeleton import UnchangedStatistics
from istanas.optimizers import SGD, Adam
from istanas.search.limits import CostsOfCandidates, Limits
from istanas.settings import LimitSettings, SearchSettings
from istanas.space import Decision, Genotype
from istanas.training import BatchLike, Compute, Metrics, Observer, evaluate

if TYPE_CHECKING:
    from istanas.search.one_stage import Freezing

Settings = TypeVar("Settings", bound=SearchSettings)
Place = tuple[str, int]  # (kind, index) of a decision, such as (cell, node).
Batches = Callable[[], Iterable[BatchLike]]


@dataclass(frozen=True)
class NodeReport:
    """One decision, such as a node, at the end of an epoch: its kept operations and the certificate of its code.

    Searches without sparse codes have no gap and no truncation.

    Args:
        cell: The kind of the decision: "normal" or "reduce" in the DARTS space.
        node: Index of the decision among those of its kind, >= 0.
        picks: The kept operations, each as "op<-state".
        edge_weights: Their edge weights.
        distance: ||z_t - z_(t-1)||_2 to the last accepted code, >= 0; 0 if the node was not recovered.
        gap: Relative duality gap, >= 0, an upper bound that includes rounding; 0 if the node was not recovered.
        truncation: ||z - z_S||_2, >= 0.
        changed: Whether the kept operations changed.
        converged: Whether the code is certified.
        recovered: Whether the node was recovered. Nodes that were already FROZEN are not.
        state: Name of the node's state after the recovery.
        magnitudes: |z| of every candidate, in the order of `Decision.candidates`; empty if the node was not recovered.
        solver: The solver that found the code; empty if the node was not recovered.
        fallback: Whether the requested solver failed on the node, so that another one found the code.
        margin: `support_margin` of the code; `None` if no other candidate could be kept.
    """

    cell: str
    node: int
    picks: list[str]
    edge_weights: list[float]
    distance: float
    gap: float
    truncation: float
    changed: bool
    converged: bool
    recovered: bool = True
    state: str = NodeState.ACTIVE.name
    magnitudes: list[float] = field(default_factory=list)
    solver: str = ""
    fallback: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class RecoveryReport:
    """All decisions at the end of an epoch.

    Args:
        nodes: The reports of all decisions.
        rejection: Why the new architecture was rejected, or `None` if it was accepted (one-stage search only).
        certified: Whether the nodes have sparse codes with certificates.
    """

    nodes: list[NodeReport]
    rejection: str | None = None
    certified: bool = True

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the epoch by their names in MLflow.

        Over the recovered nodes, they give the smallest margin, the numbers of changes and fallbacks, and the largest
        values of the gap, the truncation and the distance.
        """
        nodes = [n for n in self.nodes if n.recovered]
        if not nodes:
            return {}
        changes = {"recovery/support_changes": float(sum(n.changed for n in nodes))}
        distance = {"recovery/distance": max(n.distance for n in nodes)}
        if not self.certified:
            return {**distance, **changes}
        fallbacks = sum(n.fallback for n in nodes)
        margins = [n.margin for n in nodes if n.margin is not None]
        return {
            **({"recovery/fallbacks": float(fallbacks)} if fallbacks else {}),
            "recovery/gap": max(n.gap for n in nodes),
            "recovery/truncation": max(n.truncation for n in nodes),
            **({"recovery/margin": min(margins)} if margins else {}),
            **distance,
            **changes,
        }


class Choosing(Protocol):
    """The pictures on which `Search.validate_epoch` measures architectures and may choose one."""

    def __call__(self) -> Metrics:
        """Return the metrics of `Search.validate` for the installed architecture, on all pictures in order."""

    def pictures(self, count: int | None = None) -> Iterable[BatchLike]:
        """Return shuffled batches without augmentation, the same in every call.

        Args:
            count: Number of pictures, chosen stratified by class; `None` for all.
        """

    def training(self) -> Iterable[BatchLike]:
        """Return batches of the pictures that train the weights, the same in every call."""


class Search(Generic[Settings]):
    """A search: its state and its epochs.

    Args:
        supernet: The network, on its device.
        settings: Hyperparameters of the search.
        compute: Device and precision.
        seed: Seed of everything that the search draws.
        ranks: The processes that search together; `None` means only this one. All make the same calls, each with its
            share of every batch, and have the same network and architecture after each call.
        cost: Returns the parameters and multiply-adds of a genotype's target network; `None` for a search without
            limits.
        candidate_costs: Returns the costs of all candidates in a unit, see `istanas.candidates.candidate_costs`; `None`
            for a search without costs.

    Attributes:
        epoch: Number of completed epochs.
        first_recovery: The decisions before any training.
        limits: The limits of the architecture.
        freezings: When and why decisions froze; `None` if the method freezes none.
    """

    kind: ClassVar[str]
    """Name of the method, as it is registered."""

    has_supernet: ClassVar[bool] = True
    """Whether the candidates of a search share weights in a supernet. Else `supernet` is a `ArchitectureNetwork`."""

    state_version: ClassVar[int] = 2
    """Version of `state_dict`, increased when an older state cannot be continued."""

    accepts_divergence: ClassVar[bool] = False
    """Whether the search continues after a training that diverged. Then `train_epoch` returns `None`."""

    first_recovery: RecoveryReport
    freezings: list[Freezing] | None = None

    @classmethod
    def alpha_size(cls, settings: Settings, decision: Decision) -> int:
        """Return the number of alphas of a decision. By default there is one for each candidate."""
        return decision.n_candidates

    @classmethod
    def partial_channels(cls, settings: Settings) -> int:
        """Return k: the operations of the supernet run on 1 / k of the channels. By default they run on all (k = 1)."""
        return 1

    def __init__(
        self,
        supernet: SearchNetwork,
        settings: Settings,
        compute: Compute,
        seed: int,
        ranks: Ranks | None = None,
        cost: Callable[[Genotype], Cost] | None = None,
        candidate_costs: CostsOfCandidates | None = None,
    ) -> None:
        self.supernet = supernet
        self.settings = settings
        self.ranks = ranks or Ranks()
        self.compute = compute
        self.seed = seed
        self.cost = cost
        # The settings of a plugin's method may have no limits.
        limits = settings if isinstance(settings, LimitSettings) else LimitSettings()
        self.limits = Limits(supernet.space, limits, cost, candidate_costs)
        self.epoch = 0
        self.decisions = supernet.space.all_decisions()
        self.places: list[Place] = [(decision.kind, decision.index) for decision in self.decisions]
        self.weights = supernet.weights()
        self.alphas = supernet.alphas()
        if self.has_supernet:
            self._make_optimizers()
        self.first_recovery = self.begin()

    def _make_optimizers(self) -> None:
        settings, fused = self.settings, self.compute.device.type == "cuda"
        self.weight_optimizer = SGD(
            self.weights,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.alpha_optimizer = Adam(
            self.alphas,
            settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_weight_decay,
            fused=fused,
        )

    # ---------- what a method defines

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training.

        It is called once, at the end of the construction.
        """
        raise NotImplementedError

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Batches | None,
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> Metrics | None:
        """Run one epoch.

        Args:
            weight_batches: Batches on the device that train the weights, see `istanas.data.Batch`.
            alpha_batches: Returns the batches of one pass over the pictures that train the alphas; `None` if the
                settings have no `alpha_fraction`.
            n_steps: Number of weight batches, >= 1.
            observe: Called after every step.
            lr_factor: Factor of the weights' learning rate, > 0; below 1 after a divergence.

        Returns:
            Mean loss (without that of the auxiliary head) and accuracies, over the pictures of all ranks; `None` if the
            method trains nothing, or the training has diverged and the method accepts that.
        """
        raise NotImplementedError

    def train_step(self, batch: BatchLike, alpha_batch: BatchLike | None) -> None:
        """Run one step of an epoch, to measure its time."""
        raise NotImplementedError

    def finish_epoch(self) -> RecoveryReport:
        """Choose the architecture at the end of an epoch, and report its decisions."""
        raise NotImplementedError

    def picture_epoch(self, epoch: int) -> int:
        """Return the number that determines the order and the augmentation of an epoch's pictures.

        Args:
            epoch: Number of epochs before, which is the result by default.
        """
        return epoch

    def validate_epoch(self, choosing: Choosing) -> Metrics | None:
        """Return the validation metrics of an epoch, after `train_epoch` and before `finish_epoch`.

        By default they are those of `validate` for the installed architecture. `None` if nothing was validated.

        Args:
            choosing: The pictures for choosing.
        """
        return choosing()

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left."""
        raise NotImplementedError

    def has_converged(self, report: RecoveryReport) -> bool:
        """Return whether the search ends before its last epoch, given the report of the newest one."""
        return False

    @property
    def is_searching(self) -> bool:
        """Whether the architecture may still change."""
        return True

    @property
    def trained(self) -> tuple[int, int] | None:
        """(completed, total) epochs of the training of a fixed architecture; `None` before its beginning."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return the method's own metrics of an epoch, by their names in MLflow."""
        return {}

    # ---------- what all methods share

    def genotype(self) -> Genotype:
        """Return the architecture that the search would hand over now."""
        return self.supernet.genotype()

    def trained_genotype(self) -> Genotype:
        """Return the architecture that the current epoch trains. By default it is `genotype`."""
        return self.genotype()

    def validate(self, batches: Iterable[BatchLike], *, batch_statistics: bool = False) -> Metrics:
        """Return loss and accuracies of the active architecture in eval mode, over the pictures of all ranks.

        Args:
            batches: Batches on the device.
            batch_statistics: Whether batch norm uses the mean and variance of each batch (on each rank), as in
                training, instead of its running statistics, which do not change.
        """
        self.supernet.eval()
        norms = self._batch_norms() if batch_statistics else []
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()

        def forward(images: Tensor) -> Tensor:
            logits: Tensor = self.supernet(images, edge_weights)
            return logits

        for norm in norms:
            norm.train()
        with UnchangedStatistics(norms) if norms else nullcontext():
            metrics = evaluate(forward, batches, self.compute, self.ranks)
        self.supernet.eval()
        return metrics

    def recalibrate(self, batches: Iterable[BatchLike]) -> None:
        """Replace the running statistics of batch norm by the means over these batches, and over the ranks.

        Args:
            batches: Batches of training pictures on the device. They are passed through the active architecture in
                training mode, without gradients.
        """
        norms = self._batch_norms()
        momenta = [norm.momentum for norm in norms]
        self.supernet.train()
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()
            for done, batch in enumerate(batches):
                for norm in norms:
                    norm.momentum = 1.0 / (done + 1)  # the mean over all batches so far
                with self.compute.autocast():
                    self.supernet(Batch(*batch).images, edge_weights)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.ranks.average(self.supernet.active_buffers())

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.supernet.modules() if isinstance(m, nn.BatchNorm2d)]

    def describe_picks(self, place: Place, support: Sequence[int]) -> list[str]:
        """Return the candidates of a decision as "op<-state"."""
        kind, index = place
        candidates = self.supernet.space.decisions[kind][index].candidates
        return [f"{op}<-{state}" for op, state in (candidates[c] for c in support)]

    def uncertified_report(
        self,
        place: Place,
        support: Sequence[int],
        edge_weights: Sequence[float],
        *,
        distance: float = 0.0,
        changed: bool = False,
        magnitudes: Sequence[float] = (),
    ) -> NodeReport:
        """Return the report of a decision without a sparse code, and therefore without gap and truncation.

        Args:
            place: The decision.
            support: Its kept candidates.
            edge_weights, distance, changed, magnitudes: See `NodeReport`.
        """
        kind, index = place
        return NodeReport(
            cell=kind,
            node=index,
            picks=self.describe_picks(place, support),
            edge_weights=list(edge_weights),
            distance=distance,
            gap=0.0,
            truncation=0.0,
            changed=changed,
            converged=True,
            magnitudes=list(magnitudes),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        state = {"kind": self.kind, "version": self.state_version, "epoch": self.epoch}
        if not self.has_supernet:
            return state
        return {
            **state,
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        found, needed = ((state.get("kind"), state.get("version")), (self.kind, self.state_version))
        if found != needed:
            raise CheckpointError(
                f"{found[0]!r} version {found[1]!r} is not {needed[0]!r} version {needed[1]}, which this job needs",
                field="checkpoint",
                remedy="use another run directory or --fresh",
            )
        if self.has_supernet:
            self.supernet.load_state_dict(state["supernet"])
            self.weight_optimizer.load_state_dict(state["weight_optimizer"])
            self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.epoch = int(state["epoch"])
