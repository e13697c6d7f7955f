"""Search spaces whose network is written once: a module with a choice at each decision, for search and for training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from istanas.space.base import Decision, NetworkSize, SearchSpace

if TYPE_CHECKING:
    from torch import nn

    from istanas.candidates import PlacedCandidate
    from istanas.nets.choice import ChoiceSupernet, ChoiceTarget
    from istanas.space.genotype import Genotype

Build = Callable[[str, bool], "nn.Module"]
"""Returns a candidate, given its operation and whether its batch norms learn scale and shift."""


Make = Callable[[str, int, int, bool], "nn.Module"]
"""Returns a candidate, given its operation, channels, stride, and whether its batch norms learn scale and shift."""


class Choose(Protocol):
    """Creates the module of a decision at one place of a network. A decision may have several places."""

    def __call__(self, kind: str, index: int, channels: int, build: Build) -> nn.Module:
        """Return a module with the candidates of a decision, or only with those that a genotype keeps.

        Args:
            kind: The kind of the decision.
            index: The index of the decision.
            channels: Channels of the output of every candidate.
            build: Returns a candidate (B, C_in, H, W) -> (B, channels, H', W'), given the name of its operation and
                whether its batch norms learn scale and shift.
        """

    def operation(
        self, kind: str, index: int, channels: int, stride: int = 1, make: Make | None = None
    ) -> nn.Module:
        """Return the module of a decision whose candidates keep the number of channels.

        Such candidates can run on a part of the channels, which `pc_darts` requires.

        Args:
            kind: The kind of the decision.
            index: The index of the decision.
            channels: Channels of the input and of the output.
            stride: 1 or 2.
            make: Returns a candidate, given the name of its operation, its channels, its stride, and whether its batch
                norms learn scale and shift. By default it is the registered operation.
        """


class ChoiceSpace(SearchSpace):
    """A search space whose network is a module with a choice at each decision.

    A subclass is a frozen dataclass with `make_decisions` and `network`. In a search every choice computes the active
    candidates and adds them with their edge weights. In the network of a genotype it has only the kept candidates.
    """

    @abstractmethod
    def network(self, size: NetworkSize, choose: Choose) -> nn.Module:
        """Return the network, which maps pictures (B, C, H, W) to logits (B, classes).

        Args:
            size: The size of the network.
            choose: Creates the module of a decision. Every decision must have at least one.
        """

    def supernet(
        self,
        size: NetworkSize,
        alpha_size: Callable[[Decision], int],
        *,
        auxiliary: bool = False,
        partial: int = 1,
    ) -> ChoiceSupernet:
        """Return the network of a search."""
        from istanas.nets.choice import ChoiceSupernet

        assert not auxiliary, "a choice space has no auxiliary head"
        return ChoiceSupernet(self, size, alpha_size, partial=partial)

    def target(self, genotype: Genotype, size: NetworkSize, *, auxiliary: bool = False) -> ChoiceTarget:
        """Return the network of a genotype."""
        from istanas.nets.choice import ChoiceTarget

        assert not auxiliary, "a choice space has no auxiliary head"
        return ChoiceTarget(self, genotype, size)

    def placed_candidates(self, size: NetworkSize, shape: tuple[int, int, int]) -> Iterator[PlacedCandidate]:
        """Yield every candidate at every place of the network."""
        from istanas.candidates import choice_candidates

        return choice_candidates(self, size, shape)
