"""No search: a random architecture of the space, the baseline of every search."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from istanas.errors import ConfigError
from istanas.search.base import Batches, RecoveryReport, Search
from istanas.search.limits import within_limits
from istanas.settings import RandomSettings
from istanas.space import Decision, Genotype
from istanas.training import BatchLike, Observer, derive_seed


class RandomSearch(Search[RandomSettings]):
    """A random architecture, as a search of one epoch that trains nothing.

    The architecture of `method: random` and `seed: S` is that of `istanas retrain --genotype random:S`.

    Args:
        supernet, settings, compute, seed, ranks, cost: See `Search`.

    Example:
        >>> import torch
        >>> from istanas.nets import ArchitectureNetwork
        >>> from istanas.space import CellSpace, NetworkSize
        >>> from istanas.training import Compute
        >>> net = ArchitectureNetwork(CellSpace(), NetworkSize(2, 3, 10))
        >>> search = RandomSearch(net, RandomSettings(), Compute(torch.device("cpu")), seed=7)
        >>> search.train_epoch([], None, 0) is None, search.is_done
        (True, True)
        >>> search.genotype() == CellSpace().random(7)
        True
    """

    kind = "random"
    has_supernet = False

    @classmethod
    def alpha_size(cls, settings: RandomSettings, decision: Decision) -> int:
        """Return 0, because there are no alphas."""
        return 0

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        self.limits.check()
        space = self.supernet.space
        draws = (
            space.random_supports(derive_seed(self.seed, self.kind, number) if number else self.seed)
            for number in count()
        )
        self._supports = next(within_limits(self.limits, space, draws, 1, self.seed))
        return self._report()

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Batches | None,
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> None:
        """Count the epoch. Nothing is trained."""
        self.epoch += 1

    def train_step(self, batch: BatchLike, alpha_batch: BatchLike | None) -> None:
        """Raise an error, because there is no step.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("random trains nothing", field="method", remedy="choose another method")

    def genotype(self) -> Genotype:
        """Return the random architecture."""
        return self.supernet.space.genotype(self._supports)

    def finish_epoch(self) -> RecoveryReport:
        """Report the architecture."""
        self.ranks.check_same("genotype", self.genotype().digest())
        return self._report()

    def _report(self) -> RecoveryReport:
        nodes = []
        for kind, index in self.places:
            support = self._supports[kind][index]
            nodes.append(self.uncertified_report((kind, index), support, [1.0] * len(support)))
        return RecoveryReport(nodes, certified=False)

    @property
    def is_done(self) -> bool:
        """Whether the one epoch is over."""
        return self.epoch >= self.settings.max_epochs
