"""PC-DARTS: DARTS whose operations run on a part of the channels, with a weight for every edge.

This module does no I/O: the caller passes batches and stores the results.

Source:
    Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from istanas.search.softmax import SoftmaxSearch, grouped_softmax
from istanas.settings import PcDartsSettings
from istanas.space import Decision


class PcDartsSearch(SoftmaxSearch[PcDartsSettings]):
    """PC-DARTS: its state, its steps and its epochs. For the arguments see `Search`.

    The weight of operation o on edge e is softmax(alpha_e)_o softmax(beta)_e, the second softmax over the edges of a
    decision. The channels that bypass the operations of an edge are multiplied by softmax(beta)_e. The alphas of a
    decision are those of its candidates, followed by the betas of its edges.

    Differences from the published code: those of `DartsSearch`; in odd sizes, the max pooling of the bypass rounds up.

    Example:
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> from istanas.training import Compute
        >>> settings = PcDartsSettings(epochs=2, warmup_epochs=0)
        >>> def alpha_size(decision: Decision) -> int:
        ...     return PcDartsSearch.alpha_size(settings, decision)
        >>> net = Supernet(CellSpace(n_nodes=2), 4, 3, 10, alpha_size=alpha_size, partial=settings.partial)
        >>> search = PcDartsSearch(net, settings, Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> [len(node.picks) for node in search.finish_epoch().nodes]
        [2, 2, 2, 2]

    Source:
        Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search, ICLR 2020.
    """

    kind = "pc_darts"

    @classmethod
    def alpha_size(cls, settings: PcDartsSettings, decision: Decision) -> int:
        """Return the number of candidates plus the number of edges."""
        return decision.n_candidates + decision.n_edges

    @classmethod
    def partial_channels(cls, settings: PcDartsSettings) -> int:
        """Return k: the operations run on 1 / k of the channels."""
        return settings.partial

    @property
    def trains_alphas(self) -> bool:
        """Whether the warm-up is over."""
        return self.epoch >= self.settings.warmup_epochs

    def weigh(self, kind: str, alphas: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the product of the two softmax functions, for all candidates of each decision of a kind."""
        edges = self.edges[kind]
        betas = [a[n:] for a, n in zip(alphas, edges.sizes, strict=True)]
        of_edges = grouped_softmax(torch.cat(betas), edges.decisions)
        weights = self.probabilities(kind, alphas) * of_edges[edges.edge_of]
        return torch.split(weights, edges.sizes)
