"""Two-stage ISTA-NAS: alternate alpha and weight steps on a sparse supernet, recover the codes after each epoch.

No I/O: the caller brings batches and stores what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.errors import DataError
from istanas.nets import NodeCode, Supernet
from istanas.search.state import (
    STATE_VERSION,
    Codes,
    NodeReport,
    RecoveryReport,
    check_state_version,
    codes_from_state,
    codes_to_state,
    draw_matrices,
)
from istanas.space import CELLS
from istanas.sparse import (
    RecoveryResult,
    initial_compressed_alphas,
    recover_nodes,
    top_support,
    truncation_error,
)
from istanas.training import (
    BatchLike,
    Compute,
    Metrics,
    Observer,
    Totals,
    clip_gradients,
    cross_entropy,
    derive_seed,
    evaluate,
    learning_rate,
    set_learning_rate,
    without_gradients,
)


@dataclass(frozen=True)
class TwoStageSettings:
    """Hyperparameters of a two-stage search; the defaults are the published ones.

    Args:
        epochs: >= 1; the weights' learning rate falls from `lr` to `lr_min` over them (cosine, step by step).
        momentum, weight_decay: of SGD on the weights.
        grad_clip: largest joint norm of the weights' gradients. (The published code takes the norm over
            weights and alphas together; here the alphas never have a gradient in a weight step.)
        arch_lr, arch_betas, arch_weight_decay: of Adam on the compressed alphas.
        n_measurements, matrix, matrix_seed: of the measurement matrices; see `draw_matrices`.
        alphas_scale: deviation of the first compressed alphas.
        l1_weight, solver: of the recovery.
        termination_tol: stop early when every code moves by at most this in an epoch; None: never.
    """

    epochs: int = 50
    lr: float = 0.1
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float | None = 5.0
    arch_lr: float = 6e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_weight_decay: float = 1e-3
    n_measurements: int = 7
    matrix: str = "uniform"
    matrix_seed: int = 0
    alphas_scale: float = 1e-3
    l1_weight: float = 1e-5
    solver: str = "homotopy"
    termination_tol: float | None = None


class TwoStageSearch:
    """The state of a search and its steps.

    Args:
        supernet: on its device; its compressed alphas are initialised here.
        settings: see `TwoStageSettings`.
        compute: device and precision.
        seed: of the compressed alphas.
        ranks: who searches with this process; None: nobody. All make the same calls, each with its share of
            every batch, and hold the same network and codes after each.

    Example:
        >>> from istanas.space import CellSpace
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 2, 10)
        >>> search = TwoStageSearch(net, TwoStageSettings(epochs=1), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> len(search.recover().nodes)
        4
    """

    def __init__(
        self,
        supernet: Supernet,
        settings: TwoStageSettings,
        compute: Compute,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.supernet = supernet
        self.ranks = ranks or Ranks()
        self.settings = settings
        self.compute = compute
        self.epoch = 0  # epochs done
        self.weights = supernet.weights()
        self.alphas = supernet.alphas()
        with torch.no_grad():
            for cell in CELLS:
                for node in range(supernet.space.n_nodes):
                    b = initial_compressed_alphas(
                        settings.n_measurements,
                        derive_seed(seed, "alphas", cell, node),
                        settings.alphas_scale,
                    )
                    supernet.compressed_alphas[cell][node] = torch.as_tensor(b)
        fused = compute.device.type == "cuda"
        self.weight_optimizer = torch.optim.SGD(
            self.weights,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas,
            settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_weight_decay,
            fused=fused,
        )
        self._matrices = draw_matrices(
            supernet.space, settings.n_measurements, settings.matrix, settings.matrix_seed
        )
        self.codes: Codes = {}
        self.first_recovery = self.recover()

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Callable[[], Iterable[BatchLike]],
        n_steps: int,
        observe: Observer | None = None,
    ) -> Metrics:
        """One epoch: for every weight batch an alpha step on an alpha batch, then a weight step.

        Args:
            weight_batches: batches of the weight half.
            alpha_batches: makes a pass over the alpha half; called again if it is shorter than the weight half.
            n_steps: number of weight batches.
            observe: called after every step.

        Returns:
            Mean loss and top-1 of the weight steps, over the pictures of all ranks; the running statistics of
            batch norm are then the means over the ranks.
        """
        self.supernet.train()
        totals = Totals(self.compute.device)
        s = self.settings
        for step, (batch, alpha_batch) in enumerate(
            zip(weight_batches, endless(alpha_batches), strict=False)
        ):
            progress = (self.epoch + step / n_steps) / s.epochs
            set_learning_rate(self.weight_optimizer, learning_rate(s.lr, s.lr_min, progress))
            self.alpha_step(alpha_batch)
            self.weight_step(batch, totals)
            if observe is not None:
                observe(step + 1, totals)
        self.ranks.average(self.supernet.active_buffers())
        self.epoch += 1
        return totals.metrics(self.ranks)

    def alpha_step(self, batch: BatchLike) -> None:
        """One Adam step on the compressed alphas; no weight has a gradient."""
        images, target, weight = Batch(*batch)
        with without_gradients(self.weights):
            with self.compute.autocast():
                logits = self._forward_for_alphas(images)
            loss = cross_entropy(logits, target)
            self.alpha_optimizer.zero_grad(set_to_none=True)
            (loss * weight).backward()
        self.alpha_optimizer.step()

    def weight_step(self, batch: BatchLike, totals: Totals) -> None:
        """One SGD step on the active weights; no alpha has a gradient.

        Inactive operations keep gradient None, so that neither decay nor momentum touches them, and their
        optimiser state waits for their return.
        """
        images, target, weight = Batch(*batch)
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()
        with self.compute.autocast():
            logits = self._forward_for_weights(images, edge_weights)
        loss = cross_entropy(logits, target)
        self.weight_optimizer.zero_grad(set_to_none=True)
        (loss * weight).backward()
        clip_gradients(self.supernet.active_parameters(), self.settings.grad_clip)
        self.weight_optimizer.step()
        totals.add(loss, logits, target)

    def validate(self, batches: Iterable[BatchLike]) -> Metrics:
        """Loss and top-1 of the architecture just trained, eval mode, over the pictures of all ranks."""
        self.supernet.eval()
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()

        def forward(images: Tensor) -> Tensor:
            logits: Tensor = self.supernet(images, edge_weights)
            return logits

        return evaluate(forward, batches, self.compute, self.ranks)

    def recover(self) -> RecoveryReport:
        """Recover every node's code from its b, keep the largest entries, make them the active operations.

        Rank 0 recovers, for all.

        Returns:
            What changed, with each node's certificate. Distances are 0 at the first recovery.

        Raises:
            IstanasError: if the ranks end with different architectures.
        """
        space = self.supernet.space
        places = [(cell, node) for cell in CELLS for node in range(space.n_nodes)]
        before = [self.codes[cell][node] if self.codes else None for cell, node in places]
        results = self.ranks.from_first(lambda: self._recover_nodes(places, before))
        codes: Codes = {cell: [] for cell in CELLS}
        for (cell, node), result in zip(places, results, strict=True):
            z = torch.as_tensor(result.z)
            support = tuple(int(i) for i in top_support(z, space.sparsity, groups=space.edge_groups(node)))
            codes[cell].append(NodeCode(self._matrices[cell][node], z, support))
        self._install(codes)
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()
        reports = []
        for (cell, node), old, result in zip(places, before, results, strict=True):
            new = codes[cell][node]
            reports.append(
                NodeReport(
                    cell=cell,
                    node=node,
                    picks=[f"{space.ops[op]}<-{state}" for state, op in map(space.split, new.support)],
                    edge_weights=edge_weights[cell][node].tolist(),
                    distance=0.0 if old is None else float((new.sparse_code - old.sparse_code).norm()),
                    gap=float(result.gap),
                    truncation=float(truncation_error(new.sparse_code, list(new.support))),
                    changed=old is not None and old.support != new.support,
                    converged=bool(result.converged),
                )
            )
        return RecoveryReport(reports)

    def _recover_nodes(
        self, places: Sequence[tuple[str, int]], before: Sequence[NodeCode | None]
    ) -> list[RecoveryResult]:
        alphas = {cell: self.supernet.compressed_alphas[cell].detach().double().cpu() for cell in CELLS}
        return recover_nodes(
            [self._matrices[cell][node] for cell, node in places],
            [alphas[cell][node] for cell, node in places],
            l1_weight=self.settings.l1_weight,
            solver=self.settings.solver,
            supports=[None if old is None else old.sparse_code.nonzero().flatten().numpy() for old in before],
        )

    def _install(self, codes: Codes) -> None:
        """Make the codes' operations the active ones, on every rank the same.

        What is active has changed, so gradients are averaged over other parameters from here on.
        """
        self.codes = codes
        self.supernet.install_codes(codes)
        self.ranks.check_same("genotype", self.supernet.genotype().digest())
        self._forward_for_weights = self.ranks.data_parallel(self.supernet, self.supernet.active_parameters())
        self._forward_for_alphas = self.ranks.data_parallel(self.supernet, self.supernet.active_alphas())

    def has_converged(self, report: RecoveryReport) -> bool:
        """Whether every code moved by at most `termination_tol` in the last epoch."""
        tol = self.settings.termination_tol
        return tol is not None and all(node.distance <= tol for node in report.nodes)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit for bit."""
        return {
            "kind": "two_stage",
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "codes": codes_to_state(self.codes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: for a checkpoint of another kind or version.
        """
        check_state_version(state, "two_stage")
        self.supernet.load_state_dict(state["supernet"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        codes = codes_from_state(state["codes"])
        self._matrices = {cell: [node.measurement_matrix for node in codes[cell]] for cell in CELLS}
        self._install(codes)
        self.epoch = int(state["epoch"])


def endless(make_batches: Callable[[], Iterable[BatchLike]]) -> Iterator[BatchLike]:
    """The batches of one pass after another.

    Raises:
        DataError: if a pass has no batch, where going on would never end.
    """
    while True:
        empty = True
        for batch in make_batches():
            empty = False
            yield batch
        if empty:
            raise DataError("the alpha half has 0 batches: give it pictures, or a smaller batch_size")
