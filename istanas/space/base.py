"""Search spaces: the decisions of a search, and the networks that a space builds for search and for training.

A decision is the unit at which a search chooses. It has candidates, of which a fixed number is kept. In the DARTS space
a decision is a node of a cell, and its candidates are all operations on all its incoming edges.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from istanas.errors import ConfigError, GenotypeError
from istanas.registry import Registry

if TYPE_CHECKING:
    from istanas.candidates import PlacedCandidate
    from istanas.measure import Cost
    from istanas.nets.networks import SearchNetwork, TargetNetwork
    from istanas.space.genotype import Genotype

Pick = tuple[str, int]  # (operation, state that it reads).
Supports = Mapping[str, Sequence[Sequence[int]]]
"""For each kind the kept candidates of each of its decisions."""


@dataclass(frozen=True)
class Decision:
    """A choice among candidates.

    Args:
        kind: The kind of cell or block to which the decision belongs, such as "normal".
        index: Its index among the decisions of this kind, >= 0.
        candidates: The candidates as (operation, state that it reads), in the order of the sparse code.
        sparsity: Number of candidates that are kept, >= 1.
        edges: The edge of each candidate, as a number within the decision; by default the state that it reads.
        one_per_edge: Whether at most one candidate of each edge may be kept.

    Raises:
        ConfigError: If there are too few candidates.

    Example:
        >>> Decision("block", 0, (("conv3", 0), ("conv5", 0)), sparsity=1).n_candidates
        2
    """

    kind: str
    index: int
    candidates: tuple[Pick, ...]
    sparsity: int
    edges: tuple[int, ...] = ()
    one_per_edge: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(pick, tuple) and len(pick) == 2 for pick in self.candidates):
            raise ConfigError(
                f"{self.candidates!r:.80} are not the candidates of {self.kind} {self.index}",
                field="space",
                remedy="give candidates as (operation, state)",
            )
        if not self.edges:
            object.__setattr__(self, "edges", tuple(state for _, state in self.candidates))
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise ConfigError(
                f"{self.kind} {self.index} has no candidates, or names one twice",
                field="space",
                remedy="give each candidate once, at least one",
            )
        limit = len(set(self.edges)) if self.one_per_edge else len(self.candidates)
        if not 1 <= self.sparsity <= limit:
            raise ConfigError(
                f"{self.sparsity} cannot be chosen among the {limit} candidates of {self.kind} {self.index}",
                field="space.sparsity",
                remedy=f"choose 1 to {limit}",
            )

    @property
    def n_candidates(self) -> int:
        """Number of candidates, which is the length of the sparse code."""
        return len(self.candidates)

    @cached_property
    def n_edges(self) -> int:
        """Number of edges that have candidates."""
        return len(set(self.edges))

    @property
    def n_supports(self) -> int:
        """Number of ways to keep `sparsity` candidates.

        With `one_per_edge` it is the elementary symmetric polynomial of this degree of the candidates per edge.

        Example:
            >>> Decision("node", 0, (("a", 0), ("b", 0), ("a", 1)), sparsity=2).n_supports
            3
            >>> Decision("node", 0, (("a", 0), ("b", 0), ("a", 1)), sparsity=2, one_per_edge=True).n_supports
            2
        """
        if not self.one_per_edge:
            return math.comb(self.n_candidates, self.sparsity)
        ways = [1] + [0] * self.sparsity
        for edge in set(self.edges):
            for kept in range(self.sparsity, 0, -1):
                ways[kept] += ways[kept - 1] * self.edges.count(edge)
        return ways[self.sparsity]

    @property
    def groups(self) -> npt.NDArray[np.int64] | None:
        """The edge of every candidate if at most one candidate of each edge may be kept, else `None`."""
        return np.array(self.edges) if self.one_per_edge else None


@dataclass(frozen=True)
class NetworkSize:
    """The size of a network, and the pictures that it takes.

    Args:
        init_channels: Channels of the first cells, >= 1.
        layers: Number of cells, >= 1.
        num_classes: Number of classes, >= 1.
        stem: "cifar" or "imagenet".
        in_channels: Channels of the pictures, >= 1.
        op_batchnorm: Whether every operation ends in batch norm, as a one-stage search requires.
    """

    init_channels: int
    layers: int
    num_classes: int
    stem: str = "cifar"
    in_channels: int = 3
    op_batchnorm: bool = False


class SearchSpace(ABC):
    """A search space. A subclass is a frozen dataclass, whose fields are keys of the section `space`.

    Its objects must be hashable and small, because they are compared and sent to workers.
    """

    name: ClassVar[str]
    """Name of the space, the value of `space.name`."""

    has_auxiliary: ClassVar[bool] = False
    """Whether the networks of the space can have an auxiliary head."""

    has_partial_channels: ClassVar[bool] = False
    """Whether the supernet can run its operations on a part of the channels, which `pc_darts` requires."""

    published: ClassVar[Mapping[str, Any]] = {}
    """Genotypes of the space that have names."""

    @abstractmethod
    def make_decisions(self) -> Sequence[Decision]:
        """Return all decisions.

        The indices of each kind count from 0, and all decisions of a kind keep the same number of candidates.
        """

    @abstractmethod
    def supernet(
        self, size: NetworkSize, alpha_size: Callable[[Decision], int], *, auxiliary: bool, partial: int
    ) -> SearchNetwork:
        """Return the network of a search.

        Args:
            size: The size of the network.
            alpha_size: Returns the length of a decision's alphas.
            auxiliary: Whether the network has an auxiliary head.
            partial: The operations run on 1 / `partial` of the channels; 1 for all.
        """

    @abstractmethod
    def target(self, genotype: Genotype, size: NetworkSize, *, auxiliary: bool = False) -> TargetNetwork:
        """Return the network of a genotype, for training from scratch or with the weights of a one-stage search."""

    def cost(self, genotype: Genotype, size: NetworkSize, shape: tuple[int, int, int]) -> Cost:
        """Return parameters and multiply-adds of a genotype's network, without an auxiliary head.

        By default the network is built without memory for its weights, and counted.

        Args:
            genotype: The genotype.
            size: The size of the network.
            shape: (C, H, W) of the picture.
        """
        from istanas.measure import network_cost

        return network_cost(self, genotype, size, shape)

    def placed_candidates(self, size: NetworkSize, shape: tuple[int, int, int]) -> Iterator[PlacedCandidate]:
        """Yield every candidate at every place where it can stand in the network of a genotype.

        Searches that consider the costs of candidates need this. Each candidate has at least one place.

        Args:
            size: The size of the network.
            shape: (C, H, W) of a picture.

        Raises:
            ConfigError: If the space does not define this function.
        """
        raise ConfigError(
            f"the space {self.name} does not say where its candidates stand",
            field="space.name",
            remedy="define placed_candidates, derive the space from ChoiceSpace, or use neither limits nor cost_weight",
        )

    def read_shares(self, genotype: Genotype, size: NetworkSize) -> tuple[float, ...]:
        """Return the share of its inputs that each cell of a genotype's network reads; 0 for one that does not run.

        The prediction of latencies needs this. By default the result is empty: everything runs in every network.

        Args:
            genotype: The genotype.
            size: The size of the network.
        """
        return ()

    def check_size(self, size: NetworkSize) -> None:  # noqa: B027 (a default, not an abstract method)
        """Check that the space has a network of this size. By default every size is accepted.

        Raises:
            ConfigError: If there is none. Its field is the key without its section, such as "layers".
        """

    @cached_property
    def decisions(self) -> Mapping[str, tuple[Decision, ...]]:
        """The decisions of each kind.

        Raises:
            ConfigError: If there are none, or their indices do not count from 0.
        """
        found: dict[str, list[Decision]] = {}
        for decision in self.make_decisions():
            found.setdefault(decision.kind, []).append(decision)
        if not found:
            raise ConfigError(
                f"the space {self.name} has no decisions", field="space", remedy="give it at least one"
            )
        for kind, each in found.items():
            in_order = [decision.index for decision in each] == list(range(len(each)))
            if not in_order or len({decision.sparsity for decision in each}) > 1:
                raise ConfigError(
                    f"the decisions of kind {kind} do not count from 0, or keep different numbers of candidates",
                    field=f"space {self.name}",
                    remedy="correct make_decisions",
                )
        return {kind: tuple(each) for kind, each in found.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of decisions."""
        return tuple(self.decisions)

    def all_decisions(self) -> list[Decision]:
        """Return the decisions of all kinds."""
        return [decision for each in self.decisions.values() for decision in each]

    @property
    def n_architectures(self) -> int:
        """Number of architectures, the product of the numbers of supports of all decisions.

        Example:
            >>> from istanas.space import NasBench201Space
            >>> NasBench201Space().n_architectures  # 5^6
            15625
        """
        return math.prod(decision.n_supports for decision in self.all_decisions())

    def genotype(self, supports: Supports) -> Genotype:
        """Return the genotype that keeps these candidates.

        Args:
            supports: For each kind the kept candidates of each decision.
        """
        from istanas.space.genotype import Genotype

        choices = tuple((kind, self.picks(kind, supports[kind])) for kind in self.kinds)
        return Genotype(space=self.name, choices=choices)

    def picks(self, kind: str, supports: Sequence[Sequence[int]]) -> tuple[tuple[Pick, ...], ...]:
        """Return the kept candidates of one kind's decisions as (operation, state), sorted by candidate."""
        return tuple(
            tuple(decision.candidates[int(c)] for c in sorted(support))
            for decision, support in zip(self.decisions[kind], supports, strict=True)
        )

    def supports(self, genotype: Genotype) -> dict[str, list[tuple[int, ...]]]:
        """Return the candidates that a genotype keeps, the inverse of `genotype`.

        Raises:
            GenotypeError: If the genotype is not one of this space.
        """
        self.check(genotype)
        return {
            kind: [
                tuple(sorted(decision.candidates.index(pick) for pick in picks))
                for decision, picks in zip(decisions, genotype.picks(kind), strict=True)
            ]
            for kind, decisions in self.decisions.items()
        }

    def check(self, genotype: Genotype) -> None:
        """Check that a genotype is one of this space.

        Raises:
            GenotypeError: If it is not.
        """
        self.check_name(genotype)
        for kind in genotype.kinds:
            if kind not in self.decisions:
                raise GenotypeError(
                    f"{kind!r:.60} is no kind of decision of the space {self.name}",
                    field="genotype",
                    remedy=f"give {', '.join(self.kinds)} only",
                )
        for kind, decisions in self.decisions.items():
            chosen = genotype.picks(kind) if kind in genotype.kinds else ()
            if len(chosen) != len(decisions):
                raise GenotypeError(
                    f"{len(chosen)} decisions of kind {kind}, and the space {self.name} has {len(decisions)}",
                    field="genotype",
                    remedy="give a genotype that was found with the same settings of space",
                )
            for decision, picks in zip(decisions, chosen, strict=True):
                unknown = [pick for pick in picks if pick not in decision.candidates]
                if unknown or len(picks) != decision.sparsity:
                    what = f"{unknown[0]} is no candidate" if unknown else f"{len(picks)} candidates are kept"
                    raise GenotypeError(
                        f"{what} of {kind} {decision.index} in the space {self.name}",
                        field="genotype",
                        remedy="give a genotype that was found with the same settings of space",
                    )

    def check_name(self, genotype: Genotype) -> None:
        """Check that a genotype belongs to a space of this name.

        Raises:
            GenotypeError: If it belongs to another one.
        """
        if genotype.space != self.name:
            raise GenotypeError(
                f"belongs to the space {genotype.space}, not to {self.name}",
                field="genotype",
                remedy=f"set space.name={genotype.space}, or give a genotype of {self.name}",
            )

    def random(self, seed: int) -> Genotype:
        """Draw a genotype uniformly: the random baseline of a search.

        Args:
            seed: An integer >= 0; equal seeds give equal genotypes.
        """
        return self.genotype(self.random_supports(seed))

    def random_supports(self, seed: int) -> dict[str, list[tuple[int, ...]]]:
        """Return the candidates that `random` keeps, in ascending order."""
        rng = np.random.Generator(np.random.PCG64(seed))
        return {
            kind: [tuple(sorted(random_support(rng, decision))) for decision in each]
            for kind, each in self.decisions.items()
        }

    def parse(self, text: str) -> Genotype | None:
        """Return the genotype in a text form of the space, or `None` if the text has another form.

        Files with genotypes and `--genotype` accept such texts.

        Raises:
            GenotypeError: If the text has the form of the space, but is no genotype.
        """
        return None

    @classmethod
    def text(cls, genotype: Genotype) -> str | None:
        """Return the text form of a genotype, which `parse` reads, or `None` if there is none."""
        return None

    @classmethod
    def reference(cls, genotype: Genotype) -> str | None:
        """Return a short text, such as a number in a benchmark, that `parse` reads, or `None` if there is none."""
        return None

    def state_name(self, state: int) -> str | None:
        """Return the name of a state that candidates read, or `None` if the space has only one."""
        return None

    def describe_pick(self, op: str, state: int, word: str = "<-") -> str:
        """Return a pick in words, such as "skip_connect <- node 0".

        Args:
            op: The operation.
            state: The state that it reads.
            word: The word or sign between both.
        """
        name = self.state_name(state)
        return op if name is None else f"{op} {word} {name}"

    def drawing(self, genotype: Genotype) -> Mapping[str, Drawing]:
        """Return the drawing of each kind. By default each kind is a chain of its decisions."""
        return {
            kind: chain_drawing([[op for op, _ in picks] for picks in genotype.picks(kind)])
            for kind in genotype.kinds
        }


@dataclass(frozen=True)
class Drawing:
    """A directed graph of states from left to right, as `istanas.draw` draws it.

    Args:
        states: Labels of the states.
        edges: (source, target, operation, decision, position of the pick in its decision), in the order of the
            decisions. A connection without an operation is (source, target, None, -1, -1).
        n_decisions: Number of decisions.
        ends: Indices of the states that are inputs or outputs, not nodes.
    """

    states: tuple[str, ...]
    edges: tuple[tuple[int, int, str | None, int, int], ...]
    n_decisions: int
    ends: frozenset[int] = field(default_factory=frozenset)


def chain_drawing(chosen: Sequence[Sequence[str]]) -> Drawing:
    """Return the drawing of a chain whose steps have these operations.

    Example:
        >>> chain_drawing([["conv3"], ["skip"]]).states
        ('input', '1', 'output')
    """
    n = len(chosen)
    states = ("input", *(str(i) for i in range(1, n)), "output")
    edges = tuple(
        (i, i + 1, op, i, position) for i, ops in enumerate(chosen) for position, op in enumerate(ops)
    )
    return Drawing(states, edges, n, frozenset({0, n}))


def random_support(rng: np.random.Generator, decision: Decision) -> list[int]:
    """Draw the kept candidates of a decision uniformly, on distinct edges if at most one of each edge may be kept."""
    if not decision.one_per_edge:
        return [int(c) for c in rng.choice(decision.n_candidates, decision.sparsity, replace=False)]
    support = []
    edges = sorted(set(decision.edges))
    for position in rng.choice(decision.n_edges, decision.sparsity, replace=False):
        on_edge = [c for c, edge in enumerate(decision.edges) if edge == edges[position]]
        support.append(on_edge[int(rng.integers(len(on_edge)))])
    return support


def kind_title(kind: str) -> str:
    """Return the title of one kind of decisions.

    Example:
        >>> kind_title("normal"), kind_title("block")
        ('normal cell', 'block')
    """
    return f"{kind} cell" if kind in ("normal", "reduce") else kind


SPACES: Registry[type[SearchSpace]] = Registry("search space", "space.name")
"""The search spaces by name."""

DEFAULT_SPACE = "darts"


def space_of(genotype: Genotype) -> SearchSpace:
    """Return the search space of a genotype, with its default settings.

    Raises:
        GenotypeError: If the space is not registered.
    """
    if genotype.space not in SPACES:
        raise GenotypeError(
            f"belongs to the space {genotype.space}, which is not registered",
            field="genotype",
            remedy="name the plugin that registers it with --plugin FILE",
        )
    return SPACES[genotype.space]()


def register_space(space: type[SearchSpace]) -> None:
    """Make a search space available as `space.name: NAME`.

    Raises:
        ConfigError: If the name is taken or invalid, or the class is not a search space, lacks a method, or is no
            dataclass.
    """
    name = getattr(space, "name", None)
    if not (isinstance(space, type) and issubclass(space, SearchSpace) and isinstance(name, str)):
        raise ConfigError(
            f"{space!r:.80} is not a search space with a name",
            field="register_space",
            remedy="give a subclass of SearchSpace",
        )
    missing = sorted(getattr(space, "__abstractmethods__", ()))
    if missing or "__dataclass_params__" not in vars(space):
        raise ConfigError(
            f"{space.__name__} lacks {', '.join(missing)}"
            if missing
            else f"{space.__name__} is no dataclass",
            field=f"space {name}",
            remedy="define what is missing" if missing else "add @dataclass(frozen=True) above it",
        )
    SPACES.register(name, space)
