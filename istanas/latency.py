"""Latency of architectures, predicted from a table of the measured latencies of their candidates.

The prediction is additive. The latency of a network is that of its fixed parts (stem, preprocessing of cells, sums,
concatenations, head) and of all candidates that it keeps:

    latency = fixed mean_c r_c + scale sum_c sum_(kept i in c, r_c > 0) latency_i,

where r_c is the share of its inputs that cell c reads, see `SearchSpace.read_shares`. In most networks all are 1. Both
constants are fitted to the measured networks of some random architectures, the references. So the fixed parts contain
what all networks of a space have in common. The scale is above 1 where candidates are slower in a network than on their
own, when their inputs are in the caches.

This module does not measure; `pipeline.training.latency_measurement` does.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le, MaxLen, MinLen, Predicate
from torch import nn

from istanas.candidates import PlacedCandidate, combined_costs
from istanas.errors import ConfigError
from istanas.measure import count_params
from istanas.space import Genotype, NetworkSize, SearchSpace
from istanas.training import derive_seed

if TYPE_CHECKING:
    from istanas.sparse.lasso import Array

N_REFERENCES, N_CHECKS = 10, 6
PRIOR_WEIGHT = (0.05 / 0.3) ** 2
"""Weight w of the prior in `fit_references`: standard deviations of 0.05 (relative errors) and 0.3 (scale)."""

FIELD = "latency_table"

Shape = tuple[int, int, int]
PositiveInt = Annotated[int, Ge(1)]
Text = Annotated[str, MaxLen(200), Predicate(str.isprintable)]
Milliseconds = Annotated[float, Ge(0), Le(1e9)]


class Variant(NamedTuple):
    """The properties of a candidate on which its latency depends. Candidates with equal properties are measured once.

    Args:
        operation: The name of the operation.
        input: (C, H, W) of its input.
        output: (C, H, W) of its output.
        params: Number of its parameters.
    """

    operation: str
    input: Shape
    output: Shape
    params: int

    def __str__(self) -> str:
        """Return the variant in words.

        Example:
            >>> str(Variant("skip_connect", (16, 8, 8), (16, 4, 4), 0))
            'skip_connect from 16x8x8 to 16x4x4 with 0 parameters'
        """
        sizes = ("x".join(map(str, shape)) for shape in (self.input, self.output))
        return f"{self.operation} from {' to '.join(sizes)} with {self.params:,} parameters"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass: the median of all runs, and the quartiles, which show their spread."""

    median_ms: Milliseconds
    lower_ms: Milliseconds
    upper_ms: Milliseconds

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Return the latency of at least two runs.

        Example:
            >>> Latency.of([0.001, 0.002, 0.004])
            Latency(median_ms=2.0, lower_ms=1.5, upper_ms=3.0)
        """
        lower, median, upper = (
            1000 * each for each in statistics.quantiles(seconds, n=4, method="inclusive")
        )
        return cls(median, lower, upper)


@dataclass(frozen=True)
class CandidateLatency(Latency):
    """The latency of a variant, see `Variant`."""

    operation: Text
    input: Shape
    output: Shape
    params: Annotated[int, Ge(0)]

    @property
    def variant(self) -> Variant:
        """The variant."""
        return Variant(self.operation, self.input, self.output, self.params)


@dataclass(frozen=True)
class NetworkLatency(Latency):
    """The latency of the network of a random architecture: `space.random(seed)`."""

    seed: Annotated[int, Ge(0)]


@dataclass(frozen=True)
class Machine:
    """Where latencies were measured, as far as they depend on it.

    Args:
        backend: "torch" or "onnxruntime".
        device: "cpu" or "cuda".
        device_name: The name of the processor or of the GPU.
        threads: CPU threads.
        dtype: Type of the computation, such as "float32".
        versions: Versions of the libraries.
    """

    backend: Literal["torch", "onnxruntime"]
    device: Literal["cpu", "cuda"]
    device_name: Text
    threads: PositiveInt
    dtype: Text
    versions: dict[Text, Text]


@dataclass(frozen=True)
class LatencyTable:
    """Measured latencies of all candidates of a search space in the networks of one size.

    Args:
        machine: Where they were measured.
        space: The search space and its settings, see `describe_space`.
        network: The size of the networks.
        picture: (C, H, W) of a picture.
        batch_size: Pictures in a batch.
        runs: Number of runs of each candidate and reference.
        fixed_ms: Milliseconds of the fixed parts.
        scale: Factor of the latencies of the candidates, see `fit_references`.
        candidates: The latencies of the candidates.
        references: The latencies of the references.
        checks: The latencies of other random networks, which show the errors of the predictions.
        version: Version of the form of the table.
    """

    machine: Machine
    space: dict[str, Any]
    network: NetworkSize
    picture: Shape
    batch_size: PositiveInt
    runs: PositiveInt
    fixed_ms: Milliseconds
    scale: Annotated[float, Ge(0), Le(1e6)]
    candidates: Annotated[tuple[CandidateLatency, ...], MinLen(1)]
    references: tuple[NetworkLatency, ...] = ()
    checks: tuple[NetworkLatency, ...] = ()
    version: Literal[1] = 1


@dataclass(frozen=True)
class _PlacedVariant:
    """A candidate (kind, index of the decision, candidate) at a place in a cell, and its variant."""

    candidate: tuple[str, int, int]
    cell: int
    variant: Variant


def describe_space(space: SearchSpace) -> dict[str, Any]:
    """Return the name and the settings of a search space, as they are in JSON.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> describe_space(NasBench201Space(ops=("none", "skip_connect")))
        {'name': 'nas_bench_201', 'ops': ['none', 'skip_connect']}
    """
    settings: Any = space
    described: dict[str, Any] = json.loads(json.dumps({"name": space.name, **asdict(settings)}, default=str))
    return described


def variants_of(space: SearchSpace, size: NetworkSize, shape: Shape) -> dict[Variant, nn.Module]:
    """Return the variants of a space's candidates in a network of this size, each with a module in eval mode.

    Args:
        space: The search space.
        size: The size of the network.
        shape: (C, H, W) of a picture.

    Raises:
        ConfigError: If the space does not say where its candidates stand.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> found = variants_of(NasBench201Space(), NetworkSize(4, 8, 10), (3, 32, 32))
        >>> len(found), str(next(iter(found)))
        (15, 'none from 4x32x32 to 4x32x32 with 0 parameters')
    """
    found: dict[Variant, nn.Module] = {}
    for place, variant in _places(space, size, shape):
        found.setdefault(variant, place.module)
    return found


def _places(space: SearchSpace, size: NetworkSize, shape: Shape) -> Iterator[tuple[PlacedCandidate, Variant]]:
    known: dict[tuple[nn.Module, Shape], Variant] = {}  # Modules are compared by identity.
    for place in space.placed_candidates(size, shape):
        key = place.module, place.shape
        if key not in known:
            with torch.no_grad():
                _, *output = place.module(torch.zeros(1, *place.shape)).shape
            c, h, w = output
            known[key] = Variant(place.operation, place.shape, (c, h, w), count_params(place.module))
        yield place, known[key]


@lru_cache(maxsize=32)
def _placed_variants(space: SearchSpace, size: NetworkSize, shape: Shape) -> tuple[_PlacedVariant, ...]:
    return tuple(
        _PlacedVariant((place.kind, place.index, place.candidate), place.cell, variant)
        for place, variant in _places(space, size, shape)
    )


class LatencyPredictor:
    """The predicted latencies of the architectures of a space in networks of one size.

    Args:
        space: The search space.
        size: The size of the network.
        shape: (C, H, W) of a picture.
        measured: The milliseconds of each variant.
        fixed_ms: Milliseconds of the fixed parts, >= 0.
        scale: Factor of the milliseconds of the variants, >= 0.

    Raises:
        ConfigError: If a candidate was not measured.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> space, size, shape = NasBench201Space(), NetworkSize(4, 5, 10), (3, 8, 8)
        >>> of_convolutions = {v: float(v.operation == "nor_conv_3x3") for v in variants_of(space, size, shape)}
        >>> latencies = LatencyPredictor(space, size, shape, of_convolutions, fixed_ms=2.0, scale=1.5)
        >>> latencies.predict(space.parse("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|"))
        6.5
    """

    def __init__(
        self,
        space: SearchSpace,
        size: NetworkSize,
        shape: Shape,
        measured: Mapping[Variant, float],
        fixed_ms: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        self.space, self._size, self._measured = space, size, measured
        self._fixed_ms, self._scale = fixed_ms, scale
        self._places = _placed_variants(space, size, shape)
        for place in self._places:
            if place.variant not in measured:
                raise ConfigError(
                    f"lacks the candidate {place.variant}",
                    field=FIELD,
                    remedy="measure it again with istanas latency",
                )
        placed = [(place.candidate, scale * measured[place.variant]) for place in self._places]
        self._costs = {total: combined_costs(space, placed, total=total) for total in (False, True)}

    def costs(self, *, total: bool) -> Mapping[str, tuple[Array, ...]]:
        """Return the latency of each candidate, as the mean over its places or, in `total`, as the sum.

        Returns:
            See `istanas.candidates.candidate_costs`.
        """
        return self._costs[total]

    def predict(self, genotype: Genotype) -> float:
        """Return the latency of a genotype's network in milliseconds."""
        candidates, share = self.parts(genotype)
        return self._fixed_ms * share + self._scale * candidates

    def parts(self, genotype: Genotype) -> tuple[float, float]:
        """Return the milliseconds of the candidates that a genotype's network runs, without `scale`, and mean_c r_c."""
        shares = self.space.read_shares(genotype, self._size)
        kept = {
            (kind, index, candidate)
            for kind, each in self.space.supports(genotype).items()
            for index, support in enumerate(each)
            for candidate in support
        }
        candidates = sum(
            self._measured[place.variant]
            for place in self._places
            if place.candidate in kept and (not shares or shares[place.cell] > 0)
        )
        return candidates, statistics.fmean(shares) if shares else 1.0


def latency_predictor(
    table: LatencyTable, space: SearchSpace, size: NetworkSize, shape: Shape
) -> LatencyPredictor:
    """Return the predictions of a table.

    Args:
        table: The table.
        space: The search space.
        size: The size of the network.
        shape: (C, H, W) of a picture.

    Raises:
        ConfigError: If the table was measured for another space, another size or other pictures, or lacks a candidate.
    """
    pairs = (
        *_pairs("space", table.space, describe_space(space)),
        *_pairs("network", asdict(table.network), asdict(size)),
        ("picture", list(table.picture), list(shape)),
    )
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"was measured for another {name}, {_short(theirs)}, and the search has {_short(ours)}",
                field=FIELD,
                remedy="measure one with istanas latency and the configuration of the search",
            )
    measured = {each.variant: each.median_ms for each in table.candidates}
    return LatencyPredictor(space, size, shape, measured, table.fixed_ms, table.scale)


def _pairs(
    section: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*ours, *theirs)):
        yield f"{section}.{key}", theirs.get(key), ours.get(key)


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def network_seeds(count: int) -> list[int]:
    """Return the seeds of random networks that are measured, see `NetworkLatency`.

    Args:
        count: Number of networks, >= 1.
    """
    return [derive_seed(0, "latency", number) for number in range(count)]


def fit_references(references: Collection[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the milliseconds of the fixed parts and the scale of the candidates that fit the references best.

        min over fixed, scale >= 0 of sum_k ((fixed r_k + scale S_k) / T_k - 1)^2 + w (scale - 1)^2

    The second term with w = `PRIOR_WEIGHT` keeps the scale near 1 if the references do not determine it, because their
    candidates have equal total latencies.

    Args:
        references: For each the measured milliseconds T > 0, those of its candidates S, and r = mean_c r_c, see
            `LatencyPredictor.parts`.

    Example:
        >>> fixed, scale = fit_references([(5.0, 3.0, 1.0), (6.0, 4.0, 1.0), (4.0, 3.0, 0.5)])
        >>> round(fixed, 6), round(scale, 6)
        (2.0, 1.0)
    """
    from scipy.optimize import nnls  # imported here because only a measurement needs it

    T, S, r = np.array(list(references)).T
    weight = math.sqrt(PRIOR_WEIGHT)
    matrix = np.vstack([np.stack([r / T, S / T], axis=1), [0.0, weight]])
    fixed, scale = nnls(matrix, np.append(np.ones(len(T)), weight))[0]
    return float(fixed), float(scale)


def relative_errors(latencies: LatencyPredictor, measured: Sequence[NetworkLatency]) -> list[float]:
    """Return |predicted - measured| / measured of some random networks.

    Args:
        latencies: The predictions.
        measured: The measured networks.
    """
    predicted = [latencies.predict(latencies.space.random(each.seed)) for each in measured]
    return [abs(p - m.median_ms) / m.median_ms for p, m in zip(predicted, measured, strict=True)]


def differences(table: Machine, here: Machine) -> list[str]:
    """Return in words how two machines differ.

    Example:
        >>> there = Machine("torch", "cpu", "A", 4, "float32", {"torch": "2.14"})
        >>> here = Machine("torch", "cpu", "B", 1, "float32", {"torch": "2.14"})
        >>> differences(there, here)
        ['device A (here B)', 'threads 4 (here 1)']
    """
    pairs: list[tuple[str, Any, Any]] = [
        ("device", table.device_name, here.device_name),
        ("threads", table.threads, here.threads),
        *((f"{name}", version, here.versions.get(name)) for name, version in table.versions.items()),
    ]
    return [f"{name} {theirs} (here {ours or 'none'})" for name, theirs, ours in pairs if theirs != ours]
