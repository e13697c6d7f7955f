"""The networks of a `ChoiceSpace`: `Choice`, the module of a decision, and the networks for search and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import ConfigError
from istanas.nets.networks import EdgeWeights, NodeState, SearchNetwork, Support, TargetNetwork
from istanas.nets.operations import (
    Normalized,
    RectifiedBlock,
    ScaledBatchNorm2d,
    Zero,
    final_batchnorm,
    make_operation,
    train_affine,
)
from istanas.nets.partial import bypass, join, partial_width, split
from istanas.nets.skeleton import checkpointed
from istanas.nets.target import drop_path, sum_terms
from istanas.space import ChoiceSpace, Decision, Genotype, NetworkSize
from istanas.space.choice import Build, Make

Places = Mapping[tuple[str, int], list["Choice"]]  # The modules of each decision (kind, index).


class Choice(nn.Module):
    """A decision at one place of a network: the sum of the active candidates' outputs, times their edge weights.

    Args:
        candidates: The candidates by their index in the decision.
    """

    def __init__(self, candidates: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict({str(index): module for index, module in candidates.items()})
        self.active: Support = tuple(candidates)
        self.weights: Sequence[Tensor] | None = None  # set for the duration of a forward pass of a supernet
        self.drop_path_prob = 0.0
        self.activation_checkpointing = False

    def operations(self) -> list[nn.Module]:
        """Return the active candidates."""
        return [self.candidates[str(index)] for index in self.active]

    def forward(self, x: Tensor) -> Tensor:
        weights = [] if self.weights is None else list(self.weights)
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            norms = [m for op in self.operations() for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
            out: Tensor = checkpointed(self.mix, norms, x, *weights)
            return out
        return self.mix(x, *weights)

    def mix(self, x: Tensor, *weights: Tensor) -> Tensor:
        """Return the sum of the active candidates' outputs, times their weights if there are any."""
        terms = []
        for position, operation in enumerate(self.operations()):
            out = _weighted(operation, x, weights[position] if weights else None)
            terms.append(drop_path(out, operation, self.drop_path_prob if self.training else 0.0))
        return sum_terms(terms)


class PartialChoice(Choice):
    """A `Choice` whose candidates run on a part of the channels, see `istanas.nets.partial`.

    Args:
        candidates: The candidates by their index in the decision, with 1 / `k` of the channels.
        k: Number of parts of the channels.
        stride: The stride of the candidates, 1 or 2.
    """

    def __init__(self, candidates: Mapping[int, nn.Module], k: int, stride: int) -> None:
        super().__init__(candidates)
        self.k, self.stride = k, stride

    def mix(self, x: Tensor, *weights: Tensor) -> Tensor:
        """Return the mixed part of the channels and the other channels times the sum of the weights, shuffled."""
        part, rest = split(x, self.k)
        passed = bypass(rest, self.stride)
        if weights:
            passed = torch.stack(weights).sum() * passed
        return join(super().mix(part, *weights), passed, self.k)


class _Chooser:
    """Creates the choices of a network, see `istanas.space.choice.Choose`.

    Args:
        space: The search space.
        size: The size of the network.
        supports: The candidates to build for each decision; `None` builds all.
        affine: Whether batch norms learn scale and shift.
        partial: Candidates run on 1 / `partial` of the channels. With more than 1, only `operation` can create choices.
    """

    def __init__(
        self,
        space: ChoiceSpace,
        size: NetworkSize,
        supports: Mapping[str, Sequence[Support]] | None,
        affine: bool,
        partial: int = 1,
    ) -> None:
        self._space, self._size, self._supports, self._affine = space, size, supports, affine
        self._partial = partial
        self.places: dict[tuple[str, int], list[Choice]] = {}

    def __call__(self, kind: str, index: int, channels: int, build: Build) -> nn.Module:
        if self._partial > 1:
            raise ConfigError(
                f"{kind} {index} of the space {self._space.name} builds its own candidates, which cannot run on a part "
                "of the channels",
                field="partial",
                remedy="choose another method, or create the decision with choose.operation",
            )
        return self._choice(kind, index, Choice(self._candidates(kind, index, channels, build)))

    def operation(
        self, kind: str, index: int, channels: int, stride: int = 1, make: Make | None = None
    ) -> nn.Module:
        width, make = partial_width(channels, self._partial), make or _registered
        candidates = self._candidates(
            kind, index, width, lambda operation, affine: make(operation, width, stride, affine)
        )
        if self._partial == 1:
            return self._choice(kind, index, Choice(candidates))
        return self._choice(kind, index, PartialChoice(candidates, self._partial, stride))

    def _choice(self, kind: str, index: int, choice: Choice) -> Choice:
        self.places.setdefault((kind, index), []).append(choice)
        return choice

    def _candidates(self, kind: str, index: int, channels: int, build: Build) -> dict[int, nn.Module]:
        decision = next((d for d in self._space.all_decisions() if (d.kind, d.index) == (kind, index)), None)
        if decision is None:
            raise ConfigError(
                f"its network has a choice for {kind} {index}, which is no decision",
                field=f"space {self._space.name}",
                remedy="correct network or make_decisions",
            )
        chosen = range(decision.n_candidates) if self._supports is None else self._supports[kind][index]
        return {c: self._candidate(decision, c, channels, build) for c in chosen}

    def _candidate(self, decision: Decision, candidate: int, channels: int, build: Build) -> nn.Module:
        operation, _ = decision.candidates[candidate]
        module: object = build(operation, self._affine)
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"the candidate {operation} of {decision.kind} {decision.index} is {module!r:.60}",
                field=f"space {self._space.name}",
                remedy="return a module",
            )
        # Zeros need no batch norm: they are the same with any edge weight.
        if self._size.op_batchnorm and final_batchnorm(module) is None and not isinstance(module, Zero):
            return Normalized(module, ScaledBatchNorm2d(channels, affine=self._affine))
        return module

    def check(self) -> None:
        """Check that every decision has a place.

        Raises:
            ConfigError: If one has none.
        """
        for decision in self._space.all_decisions():
            if (decision.kind, decision.index) not in self.places:
                raise ConfigError(
                    f"its network has no choice for {decision.kind} {decision.index}",
                    field=f"space {self._space.name}",
                    remedy="call choose for every decision",
                )


def _registered(operation: str, channels: int, stride: int, affine: bool) -> nn.Module:
    return make_operation(operation, channels, stride, affine=affine)


def chosen_network(space: ChoiceSpace, size: NetworkSize) -> tuple[nn.Module, Places]:
    """Return the network of a `ChoiceSpace` with all candidates as they are in the networks of genotypes.

    Raises:
        ConfigError: If the space cannot be built.
    """
    chooser = _Chooser(space, size, None, affine=True)
    network = space.network(size, chooser)
    chooser.check()
    return network, chooser.places


class ChoiceTarget(TargetNetwork):
    """The network of a genotype of a `ChoiceSpace`.

    Args:
        space: The search space.
        genotype: The genotype.
        size: The size of the network.

    Raises:
        GenotypeError: If the genotype is not one of the space.
    """

    def __init__(self, space: ChoiceSpace, genotype: Genotype, size: NetworkSize) -> None:
        super().__init__()
        self.auxiliary_head = None
        chooser = _Chooser(space, size, space.supports(genotype), affine=True)
        self.network = space.network(size, chooser)
        chooser.check()
        self.places: Places = chooser.places

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, None]:
        for choice in _all(self.places):
            choice.drop_path_prob = self.drop_path_prob
            choice.activation_checkpointing = self.activation_checkpointing
        return self.network(x), None

    def active_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def active_buffers(self) -> list[Tensor]:
        return [b for b in self.buffers() if b.is_floating_point()]


class ChoiceSupernet(SearchNetwork):
    """The network of a search in a `ChoiceSpace`.

    Args:
        space: The search space.
        size: The size of the network.
        alpha_size: Returns the number of alphas of a decision.
        partial: The candidates run on 1 / `partial` of the channels.

    Raises:
        ConfigError: If the space cannot be built, or its candidates cannot run on a part of the channels.
    """

    def __init__(
        self,
        space: ChoiceSpace,
        size: NetworkSize,
        alpha_size: Callable[[Decision], int],
        *,
        partial: int = 1,
    ) -> None:
        super().__init__()
        self.space: ChoiceSpace = space
        self.size = size
        self.auxiliary_head = None
        chooser = _Chooser(space, size, None, affine=size.op_batchnorm, partial=partial)
        self.network = space.network(size, chooser)
        chooser.check()
        self.places: Places = chooser.places
        candidates = [m for choice in _all(self.places) for m in choice.candidates.values()]
        # Each parameter with the candidates that contain it. Some searches choose other candidates in every step, and
        # torch's traversal of the modules would take milliseconds.
        owners: dict[int, set[nn.Module]] = {}
        for module in candidates:
            for p in module.parameters():
                owners.setdefault(id(p), set()).add(module)
        self._owned = [(p, owners.get(id(p), set())) for p in self.network.parameters()]
        self._inactive: set[nn.Module] = set()
        self._frozen: dict[tuple[str, int], bool] = {}  # whether affine parts are trained
        self._active_parameters: list[nn.Parameter] = []
        self.set_alphas(alpha_size)

    def activate(self, supports: Mapping[str, Sequence[Support]]) -> set[str]:
        self._inactive = set()
        for (kind, index), choices in self.places.items():
            is_frozen = self.node_states[kind][index] is NodeState.FROZEN
            changed = self._frozen.get((kind, index)) is not is_frozen
            self._frozen[kind, index] = is_frozen
            for choice in choices:
                choice.active = tuple(supports[kind][index])
                if changed:
                    train_affine(choice, is_trained=is_frozen)
                for candidate, module in choice.candidates.items():
                    if int(candidate) not in choice.active:
                        self._inactive.add(module)
        self._active_parameters = [
            p for p, owners in self._owned if p.requires_grad and self._inactive.isdisjoint(owners)
        ]
        return set(self.space.kinds)

    def active_parameters(self) -> list[nn.Parameter]:
        return list(self._active_parameters)

    def active_buffers(self) -> list[Tensor]:
        # Not stored, because moving a network to another device or type replaces its buffers.
        inactive = {id(b) for module in self._inactive for b in module.buffers()}
        return [b for b in self.network.buffers() if b.is_floating_point() and id(b) not in inactive]

    def forward_with_auxiliary(self, x: Tensor, weights: EdgeWeights | None = None) -> tuple[Tensor, None]:
        weights = self.edge_weights() if weights is None else weights
        for (kind, index), choices in self.places.items():
            alphas = list(weights[kind][index])
            for choice in choices:
                choice.weights = alphas
                choice.drop_path_prob = self.drop_path_prob
                choice.activation_checkpointing = self.activation_checkpointing
        try:
            return self.network(x), None
        finally:
            for choice in _all(self.places):
                choice.weights = None

    def copy_weights(self, target: ChoiceTarget) -> list[tuple[nn.Module, Tensor]]:
        own = self.network.state_dict()
        target.network.load_state_dict({name: own[name] for name in target.network.state_dict()})
        edge_weights = self.edge_weights()
        return [
            (operation, alpha)
            for (kind, index), choices in target.places.items()
            for choice in choices
            for operation, alpha in zip(choice.operations(), edge_weights[kind][index], strict=True)
        ]


def _weighted(operation: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the output of an operation times its weight, which a batch norm at its end applies at no cost."""
    out: Tensor
    if isinstance(operation, RectifiedBlock):
        return operation.after_relu(F.relu(x), weight)
    if isinstance(operation, Normalized):
        out = operation(x, weight)
        return out
    out = operation(x)
    return out if weight is None else weight * out


def _all(places: Places) -> list[Choice]:
    """Return the choices of all decisions."""
    return [choice for choices in places.values() for choice in choices]
