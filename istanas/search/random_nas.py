"""Random search with weight sharing: every step trains one uniformly random architecture of the space.

After the last epoch, random candidates are measured with the shared weights: first all of them on some pictures of the
alpha half, then the best of them on all pictures of the alpha half. The best candidate is the result.

Differences from the paper and from the published code:

- The candidates are architectures of the space. In the DARTS space a node may read one state twice, as in ISTA-NAS;
  `space.one_op_per_edge: true` draws two distinct edges, as published. The operation `none` is not a candidate.
- The published code measures each candidate on the next pictures of the alpha half; here all candidates are measured on
  the same ones.
- The published code repeats the choice for every 10,000 steps of training, and takes the best of all. Here it is done
  once; `candidates` may be larger.
- The running statistics of batch norm are a mixture of all architectures. The published code measures with them
  (`statistics: running`); the default is the statistics of each batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, islice
from typing import Any

from istanas.nets.networks import Support
from istanas.search.base import Choosing, RecoveryReport
from istanas.search.limits import within_limits
from istanas.search.sampled import SampledSearch, Supports
from istanas.settings import RandomNasSettings
from istanas.space import Decision
from istanas.training import BatchLike, Metrics, Totals, derive_seed


class RandomNasSearch(SampledSearch[RandomNasSettings]):
    """A random search with weight sharing: its state, its steps and its epochs.

    Until the result is chosen, the report and the validation accuracy of an epoch are those of one random architecture.

    Args:
        supernet, settings, compute, seed, ranks, cost: See `Search`.

    Example:
        >>> import torch
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 3, 10, alpha_size=lambda decision: 0)
        >>> search = RandomNasSearch(net, RandomNasSettings(epochs=2), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> search.finish_epoch().nodes[0].edge_weights
        [1.0, 1.0]

    Source:
        Li and Talwalkar, Random Search and Reproducibility for Neural Architecture Search, UAI 2019.
    """

    kind = "random_nas"

    @classmethod
    def alpha_size(cls, settings: RandomNasSettings, decision: Decision) -> int:
        """Return 0, because there are no alphas."""
        return 0

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        self.limits.check()
        self._wrap()
        self._before: Supports = self._drawn("shown", 0)
        self.install_unweighted(self._before)
        return self._report(self._before)

    @property
    def trains_alphas(self) -> bool:
        """False: there are no alphas."""
        return False

    def _drawn(self, purpose: str, *numbers: int) -> dict[str, list[Support]]:
        seed = derive_seed(self.seed, self.kind, purpose, *numbers)
        return self.supernet.space.random_supports(seed)

    def weight_step(self, batch: BatchLike, totals: Totals) -> None:
        """Draw an architecture, and run one SGD step on its weights."""
        self.install_unweighted(self.supernet.space.random_supports(self.step_seed("weights")))
        super().weight_step(batch, totals)

    def end_steps(self) -> None:
        """Install the random architecture that the epoch shows."""
        self.install_unweighted(self._drawn("shown", self.epoch))

    # ---------- measuring and choosing

    def validate_epoch(self, choosing: Choosing) -> Metrics:
        """Measure the installed architecture; after the last epoch, first choose the best candidate."""
        if self.is_done:
            self.install_unweighted(self._best(choosing))
        return self._measured(choosing)

    def _best(self, choosing: Choosing) -> Supports:
        """Return the best candidate: by top-1, then by loss, then the one that was drawn first."""
        s = self.settings
        draws = (self._drawn("candidate", number) for number in count())
        candidates = list(within_limits(self.limits, self.supernet.space, draws, s.candidates, self.seed))
        if s.candidate_pictures is not None:
            candidates = self._ranked(candidates, choosing, s.candidate_pictures)[: s.finalists]
        return candidates[0] if len(candidates) == 1 else self._ranked(candidates, choosing)[0]

    def _ranked(
        self, candidates: list[dict[str, list[Support]]], choosing: Choosing, n_pictures: int | None = None
    ) -> list[dict[str, list[Support]]]:
        scores = []
        for number, supports in enumerate(candidates):
            self.install_unweighted(supports)
            measured = self._measured(choosing, n_pictures)
            scores.append((-measured.top1, measured.loss, number))
        return [candidates[number] for _, _, number in sorted(scores)]

    def _measured(self, choosing: Choosing, n_pictures: int | None = None) -> Metrics:
        s = self.settings
        if s.statistics == "recalibrated":
            self.recalibrate(islice(choosing.training(), s.calibration_batches))
        return self.validate(choosing.pictures(n_pictures), batch_statistics=s.statistics == "batch")

    # ---------- the state

    def finish_epoch(self) -> RecoveryReport:
        """Report the installed architecture."""
        self.ranks.check_same("genotype", self.genotype().digest())
        before, self._before = self._before, self.installed
        return self._report(before)

    def _report(self, before: Supports) -> RecoveryReport:
        nodes = []
        for kind, index in self.places:
            support = self.installed[kind][index]
            changed = support != before[kind][index]
            nodes.append(
                self.uncertified_report((kind, index), support, [1.0] * len(support), changed=changed)
            )
        return RecoveryReport(nodes, certified=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        supports = {kind: [list(support) for support in each] for kind, each in self.installed.items()}
        return {**super().state_dict(), "supports": supports}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        self._before = {
            kind: [tuple(support) for support in each] for kind, each in state["supports"].items()
        }
        self.install_unweighted(self._before)
