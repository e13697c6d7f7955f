"""The candidates of a search space where they stand in a network: their modules, their inputs, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from istanas.errors import ConfigError
from istanas.measure import Cost, count_macs, count_params
from istanas.nets.choice import chosen_network
from istanas.nets.operations import make_operation
from istanas.nets.skeleton import cell_places, live_places, live_states
from istanas.settings import CountedUnit
from istanas.space import CELLS, N_CELL_INPUTS, ChoiceSpace, Genotype, NetworkSize, SearchSpace

if TYPE_CHECKING:
    from istanas.space import CellSpace
    from istanas.sparse.lasso import Array


@dataclass(frozen=True)
class PlacedCandidate:
    """A candidate at one place of a network. A decision may have several places, such as one in each cell.

    Args:
        kind: The kind of the decision.
        index: The index of the decision.
        candidate: The candidate's index in the decision.
        operation: The name of the operation.
        shape: (C, H, W) of its input.
        module: Its module, in eval mode. Candidates may share modules.
        cell: The number of the cell in which the place lies, as in `SearchSpace.read_shares`.
    """

    kind: str
    index: int
    candidate: int
    operation: str
    shape: tuple[int, int, int]
    module: nn.Module
    cell: int = 0


def cell_candidates(
    space: CellSpace, size: NetworkSize, shape: tuple[int, int, int]
) -> Iterator[PlacedCandidate]:
    """Yield the candidates of a `CellSpace` in all cells of a target network, see `SearchSpace.placed_candidates`.

    Equal candidates share one module.
    """
    places = cell_places(size.init_channels, size.layers, size.stem, dict.fromkeys(CELLS, space.n_nodes))
    _, h, w = shape
    for _ in range(3 if size.stem == "imagenet" else 0):
        h, w = ceil(h / 2), ceil(w / 2)
    made: dict[tuple[str, int, int], nn.Module] = {}
    for cell, place in enumerate(places):
        before = h, w
        if place.stride == 2:
            h, w = ceil(h / 2), ceil(w / 2)
        for decision in space.decisions[place.kind]:
            for candidate, (operation, state) in enumerate(decision.candidates):
                stride, side = (place.stride, before) if state < N_CELL_INPUTS else (1, (h, w))
                key = operation, place.channels, stride
                if key not in made:
                    made[key] = _operation(*key, size.op_batchnorm)
                yield PlacedCandidate(
                    place.kind,
                    decision.index,
                    candidate,
                    operation,
                    (place.channels, *side),
                    made[key],
                    cell,
                )


def cell_read_shares(genotype: Genotype, size: NetworkSize) -> tuple[float, ...]:
    """Return the share of its two inputs that each cell of a target network reads, see `SearchSpace.read_shares`.

    Example:
        >>> from istanas.space import PUBLISHED
        >>> cell_read_shares(PUBLISHED["ISTA_twostage"], NetworkSize(16, 3, 10))
        (1.0, 1.0, 1.0)
    """
    places = cell_places(size.init_channels, size.layers, size.stem, dict.fromkeys(CELLS, 1))
    states = {
        kind: live_states([[s for _, s in node] for node in genotype.picks(kind)], genotype.concat(kind))
        for kind in CELLS
    }
    live = live_places([place.kind for place in places], states)[N_CELL_INPUTS:]
    return tuple(
        sum(state in states[place.kind] for state in range(N_CELL_INPUTS)) / N_CELL_INPUTS if is_live else 0.0
        for place, is_live in zip(places, live, strict=True)
    )


def _operation(name: str, channels: int, stride: int, op_batchnorm: bool) -> nn.Module:
    """Return an operation as in a target network."""
    with torch.random.fork_rng(devices=[]):
        return make_operation(
            name, channels, stride, affine=True, batchnorm=op_batchnorm, identity_batchnorm=op_batchnorm
        ).eval()


def choice_candidates(
    space: ChoiceSpace, size: NetworkSize, shape: tuple[int, int, int]
) -> Iterator[PlacedCandidate]:
    """Yield the candidates of a `ChoiceSpace` at all places of its network, see `SearchSpace.placed_candidates`.

    The network is built with all candidates. It then computes the first candidate of each decision, to find the shapes.
    """
    with torch.random.fork_rng(devices=[]):
        network, places = chosen_network(space, size)
    network.eval()
    shapes: dict[int, tuple[int, int, int]] = {}

    def remember(choice: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes[id(choice)] = tuple(inputs[0].shape[1:])

    for choices in places.values():
        for choice in choices:
            choice.active = (0,)
            choice.register_forward_pre_hook(remember)
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    for (kind, index), choices in places.items():
        decision = space.decisions[kind][index]
        for choice in choices:
            if id(choice) not in shapes:
                raise ConfigError(
                    f"its network does not compute {kind} {index}",
                    field=f"space {space.name}",
                    remedy="correct network",
                )
            for candidate, (operation, _) in enumerate(decision.candidates):
                yield PlacedCandidate(
                    kind,
                    index,
                    candidate,
                    operation,
                    shapes[id(choice)],
                    choice.candidates[str(candidate)],
                )


@lru_cache(maxsize=32)
def candidate_costs(
    space: SearchSpace,
    size: NetworkSize,
    shape: tuple[int, int, int],
    unit: CountedUnit,
    *,
    total: bool = False,
) -> Mapping[str, tuple[Array, ...]]:
    """Return the cost of each candidate, averaged over the places where it stands, or their sum.

    The cost is counted on the modules of the network of a genotype, with the inputs that they have there.

    Args:
        space: The search space.
        size: The size of the network.
        shape: (C, H, W) of a picture.
        unit: "macs" (multiply-adds for one picture) or "params".
        total: Whether the costs are summed over the places, which is what a network gains. A reduction cell stands in
            fewer places than a normal one.

    Returns:
        For each kind and decision the costs of its candidates, (n,), >= 0.

    Raises:
        ConfigError: If the space does not say where its candidates stand.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> costs = candidate_costs(NasBench201Space(), NetworkSize(16, 5, 10), (3, 32, 32), "params")
        >>> costs["cell"][0].tolist()  # none, skip_connect, nor_conv_1x1, nor_conv_3x3, avg_pool_3x3
        [0.0, 0.0, 1866.6666666666667, 16202.666666666666, 0.0]
    """
    counted: dict[tuple[nn.Module, tuple[int, int, int]], Cost] = {}  # modules are compared by identity

    def placed() -> Iterator[tuple[tuple[str, int, int], float]]:
        for place in space.placed_candidates(size, shape):
            key = place.module, place.shape
            if key not in counted:
                counted[key] = _cost(place)
            yield (place.kind, place.index, place.candidate), getattr(counted[key], unit)

    return combined_costs(space, placed(), total=total)


def combined_costs(
    space: SearchSpace, placed: Iterable[tuple[tuple[str, int, int], float]], *, total: bool
) -> Mapping[str, tuple[Array, ...]]:
    """Return the cost of each candidate from its costs at all its places: their mean, or their sum.

    Args:
        space: The search space.
        placed: For each place the candidate (kind, index of the decision, candidate), and its cost there.
        total: Whether the costs are summed.
    """
    found: dict[tuple[str, int, int], list[float]] = {}
    for candidate, cost in placed:
        found.setdefault(candidate, []).append(cost)
    combine = np.sum if total else np.mean
    return {
        kind: tuple(
            np.array([float(combine(found[kind, d.index, c])) for c in range(d.n_candidates)]) for d in each
        )
        for kind, each in space.decisions.items()
    }


def _cost(place: PlacedCandidate) -> Cost:
    return Cost(count_params(place.module), count_macs(place.module, place.shape))
