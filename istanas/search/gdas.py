"""GDAS: sample one operation on each edge by Gumbel-softmax, and train only the sampled operations.

On an edge with alphas a_k and Gumbel noise o_k, with p = softmax(a) and the temperature tau:

    h_k = exp((log p_k + o_k) / tau) / sum_j exp((log p_j + o_j) / tau)

The operation K = argmax_k (log p_k + o_k) = argmax_k h_k is computed, with the edge weight 1. In the backward pass its
edge weight is h_K, so that all alphas of the edge get a gradient through the softmax.

Differences from the paper and from the published code:

- What is differentiated: as in the paper, the gradient of an edge comes from its sampled operation alone:
  dL/dh_K = <dL/dx, f_K(input)> for the edge's output x, and dL/dh_k = 0 for every other operation. The alphas of these
  operations move, because h_K depends on them. The published code also adds the number h_k - h_k.detach() = 0 of every
  other operation to the output, so that dL/dh_k is the sum of dL/dx, as if the operation returned ones. The paper does
  not have this term, and it is left out here.
- The alpha step comes before the weight step, as in all alternating searches here; the published code reverses them.
  Each of the two steps samples its own architecture, as published.
- In the DARTS space the operation `none` is not a candidate, and both cells are searched. The paper's variant with a
  fixed reduction cell (FRC) is not available.
- Validation measures the most probable operation of each edge; the published code samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from istanas.nets.networks import Support
from istanas.search.base import RecoveryReport
from istanas.search.sampled import SampledSearch
from istanas.search.selection import strongest_supports
from istanas.search.softmax import alphas_of, cost_metrics, cost_penalty
from istanas.settings import GdasSettings
from istanas.space import Decision, Genotype
from istanas.training import BatchLike, Totals, derive_seed

Arrays = dict[str, list[Tensor]]  # for each kind a tensor of each decision


def gumbel_softmax(alphas: Tensor, noise: Tensor, tau: float) -> Tensor:
    """Return the probabilities h of the Gumbel-softmax, in the last dimension.

    h_k = exp((log p_k + o_k) / tau) / sum_j exp((log p_j + o_j) / tau) with p = softmax(a). As log p_k is a_k minus a
    constant, this is softmax((a + o) / tau).

    Args:
        alphas: a, (..., k); -inf for an operation that does not exist.
        noise: o, (..., k), standard Gumbel numbers.
        tau: The temperature, > 0.

    Example:
        >>> gumbel_softmax(torch.zeros(2), torch.tensor([0.0, 0.1]), tau=0.1).tolist()[1]  # 1 / (1 + e^-1)
        0.7310585975646973

    Source:
        Dong and Yang, Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019, equation 5.
    """
    return ((alphas + noise) / tau).softmax(-1)


def temperature(epoch: int, epochs: int, tau_max: float, tau_min: float) -> float:
    """Return the temperature of an epoch (from 0): linear from `tau_max` in the first to `tau_min` in the last.

    Example:
        >>> [temperature(epoch, 3, 10.0, 0.1) for epoch in range(3)]
        [10.0, 5.05, 0.1]
    """
    return tau_min + (tau_max - tau_min) * (1.0 - epoch / max(epochs - 1, 1))


class EdgeTable:
    """The candidates of one kind's decisions as a table: a row for each edge, padded to equal length.

    Args:
        decisions: The decisions of the kind.
        device: The device of the table.

    Attributes:
        candidates: For each row its decision and its candidates.

    Example:
        >>> pair = Decision("block", 0, (("a", 0), ("b", 0), ("a", 1)), sparsity=1)
        >>> EdgeTable([pair], torch.device("cpu")).rows([torch.tensor([1.0, 2.0, 3.0])]).tolist()
        [[1.0, 2.0], [3.0, -inf]]
    """

    def __init__(self, decisions: Sequence[Decision], device: torch.device) -> None:
        self.candidates: list[tuple[int, list[int]]] = [
            (place, [c for c, e in enumerate(decision.edges) if e == edge])
            for place, decision in enumerate(decisions)
            for edge in sorted(set(decision.edges))
        ]
        starts = np.cumsum([0, *(decision.n_candidates for decision in decisions)])
        width = max(len(candidates) for _, candidates in self.candidates)
        self.shape = len(self.candidates), width
        index = torch.zeros(self.shape, dtype=torch.int64)
        padding = torch.ones(self.shape, dtype=torch.bool)
        for row, (place, candidates) in enumerate(self.candidates):
            index[row, : len(candidates)] = torch.tensor(candidates) + int(starts[place])
            padding[row, : len(candidates)] = False
        self._index, self._padding = index.to(device), padding.to(device)

    def rows(self, alphas: Sequence[Tensor]) -> Tensor:
        """Return the table (edges, k) of one kind's alphas, differentiable in them; its padding is -inf."""
        on = alphas[0].device
        table = torch.cat([*alphas])[self._index.to(on)]
        return table.masked_fill(self._padding.to(on), -torch.inf)

    def choice(self, positions: Sequence[int]) -> tuple[list[Support], list[int]]:
        """Return the supports that have one candidate of each row.

        Args:
            positions: The position of the candidate in each row.

        Returns:
            The support of each decision, and the rows in the order of these supports.
        """
        chosen: dict[int, list[tuple[int, int]]] = {}
        for row, ((place, candidates), position) in enumerate(zip(self.candidates, positions, strict=True)):
            chosen.setdefault(place, []).append((candidates[position], row))
        supports = [tuple(candidate for candidate, _ in sorted(each)) for each in chosen.values()]
        return supports, [row for each in chosen.values() for _, row in sorted(each)]


class GdasSearch(SampledSearch[GdasSettings]):
    """A search by GDAS: its state, its steps and its epochs.

    Args:
        supernet, settings, compute, seed, ranks, cost: See `Search`.

    Example:
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 3, 10, alpha_size=lambda decision: decision.n_candidates)
        >>> search = GdasSearch(net, GdasSettings(epochs=1), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> [len(node.picks) for node in search.finish_epoch().nodes]
        [2, 2, 2, 2]

    Source:
        Dong and Yang, Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019.
    """

    kind = "gdas"

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        with torch.no_grad():
            for kind, index in self.places:
                alphas = self.supernet.node_alphas(kind)[index]
                rng = np.random.Generator(np.random.PCG64(derive_seed(self.seed, "alphas", kind, index)))
                drawn = self.settings.alphas_scale * rng.standard_normal(len(alphas))
                alphas.copy_(torch.as_tensor(drawn))
        self._tables = {
            kind: EdgeTable(each, self.alphas[0].device)
            for kind, each in self.supernet.space.decisions.items()
        }
        self.limits.check()
        self._penalty = cost_penalty(self)
        self._wrap()
        self._before = self.probabilities()
        self._install()
        return self._report(self._before)

    @property
    def tau(self) -> float:
        """The temperature of the current epoch."""
        s = self.settings
        return temperature(min(self.epoch, s.epochs - 1), s.epochs, s.tau_max, s.tau_min)

    # ---------- the steps

    def alpha_step(self, batch: BatchLike) -> None:
        """Sample an architecture, and run one Adam step on the alphas."""
        self._install(self.step_seed("alphas"))
        super().alpha_step(batch)

    def before_alpha_update(self) -> None:
        """Add the gradient of the expected cost."""
        if self._penalty is not None:
            self._penalty.add_gradients(alphas_of(self))

    def weight_step(self, batch: BatchLike, totals: Totals) -> None:
        """Sample an architecture, and run one SGD step on its weights."""
        self._install(self.step_seed("weights"))
        super().weight_step(batch, totals)

    def _install(self, seed: int | None = None) -> None:
        """Sample an operation on each edge with Gumbel noise, and install them.

        Args:
            seed: Seed of the noise; `None` installs the most probable operations.
        """
        rng = None if seed is None else np.random.Generator(np.random.PCG64(seed))
        alphas = self._alphas_on_cpu()
        supports: dict[str, list[Support]] = {}
        sampled: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for kind, table in self._tables.items():
            noise = torch.zeros(table.shape)
            if rng is not None:
                noise = torch.as_tensor(rng.gumbel(size=table.shape))
            rows = table.rows(alphas[kind])
            positions = (rows + noise.to(rows.dtype)).argmax(1)
            supports[kind], order = table.choice(positions.tolist())
            sampled[kind] = noise.to(rows.dtype), positions, torch.tensor(order)
        self.supernet.install(supports, partial(self._weigh, sampled, supports, self.tau))

    def _weigh(
        self,
        sampled: Mapping[str, tuple[Tensor, Tensor, Tensor]],
        supports: Mapping[str, Sequence[Support]],
        tau: float,
        kind: str,
        alphas: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """Return the edge weights of the sampled operations: 1, with the gradient of h."""
        noise, positions, order = (each.to(alphas[0].device, non_blocking=True) for each in sampled[kind])
        h = gumbel_softmax(self._tables[kind].rows(alphas), noise, tau)
        chosen = h.gather(1, positions[:, None])[order, 0]
        weights = 1.0 + (chosen - chosen.detach())
        return list(torch.split(weights, [len(support) for support in supports[kind]]))

    def _alphas_on_cpu(self) -> Arrays:
        flat = torch.cat([b.detach() for b in self.alphas]).cpu()  # one transfer for all
        parts = iter(flat.split([len(b) for b in self.alphas]))
        return {kind: [next(parts) for _ in each] for kind, each in self.supernet.space.decisions.items()}

    # ---------- the epochs

    def end_steps(self) -> None:
        """Install the most probable operation of each edge."""
        self._install()

    def probabilities(self) -> Arrays:
        """Return, for each decision, the probabilities p of its candidates on their edges, float64."""
        alphas = {kind: [b.double() for b in each] for kind, each in self._alphas_on_cpu().items()}
        found = {kind: [torch.zeros_like(b) for b in each] for kind, each in alphas.items()}
        for kind, table in self._tables.items():
            rows = table.rows(alphas[kind]).softmax(1)
            for (place, candidates), row in zip(table.candidates, rows, strict=True):
                found[kind][place][candidates] = row[: len(candidates)]
        return found

    def kept(self, probabilities: Arrays) -> dict[str, list[Support]]:
        """Return the candidates that each decision keeps in the end, see `strongest` and `Limits.within`."""
        strongest = strongest_supports(self.supernet.space.decisions, probabilities)
        return self.limits.within(strongest, probabilities)

    def genotype(self) -> Genotype:
        """Return the architecture of the strongest operations."""
        return self.supernet.space.genotype(self.kept(self.probabilities()))

    def finish_epoch(self) -> RecoveryReport:
        """Report the strongest operations, with their probabilities as edge weights."""
        self.ranks.check_same("genotype", self.genotype().digest())
        before, self._before = self._before, self.probabilities()
        return self._report(before)

    def _report(self, before: Arrays) -> RecoveryReport:
        now, kept, kept_before = self._before, self.kept(self._before), self.kept(before)
        nodes = []
        for kind, index in self.places:
            p, support = now[kind][index], kept[kind][index]
            nodes.append(
                self.uncertified_report(
                    (kind, index),
                    support,
                    p[list(support)].tolist(),
                    distance=float((p - before[kind][index]).norm()),
                    changed=support != kept_before[kind][index],
                    magnitudes=p.tolist(),
                )
            )
        return RecoveryReport(nodes, certified=False)

    def metrics(self) -> dict[str, float]:
        """Return the temperature of the newest epoch, and the expected cost."""
        s = self.settings
        tau = temperature(max(self.epoch - 1, 0), s.epochs, s.tau_max, s.tau_min)
        return {"arch/temperature": tau, **cost_metrics(self, self._penalty)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        self._before = self.probabilities()
        self._install()
