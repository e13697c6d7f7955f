"""The search space of NAS-Bench-201 (Dong and Yang, ICLR 2020), with the benchmark's own strings and indices.

One cell is repeated in the whole network. It has 4 nodes, and one operation on each of the 6 edges between them. Node 0
is the cell's input and node 3 its output.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from istanas.errors import ConfigError, GenotypeError
from istanas.registry import did_you_mean
from istanas.space.base import Decision, Drawing, NetworkSize, Pick, register_space
from istanas.space.choice import ChoiceSpace, Choose

if TYPE_CHECKING:
    from torch import nn

    from istanas.space.genotype import Genotype

Operation = Literal["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
"""The operations, in the order of the benchmark."""

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""(source, target) of every edge, in the order of the benchmark's strings."""

N_NODES = 4
N_CELLS = len(OPERATIONS) ** len(EDGES)
"""Number of cells in the benchmark."""

N_STAGES = 3
KIND = "cell"
_PREFIX = "nas_bench_201:"
_FORM = "give |op~0|+|op~0|op~1|+|op~0|op~1|op~2|"
_SHUFFLE_SEED = 88  # The benchmark numbers its cells in this random order.


@dataclass(frozen=True)
class NasBench201Space(ChoiceSpace):
    """The space of NAS-Bench-201: one cell of 4 nodes and 6 edges, with one operation on each edge.

    Args:
        ops: Candidate operations on each edge, each named once.

    Raises:
        ConfigError: If an operation is unknown or named twice, or there is none.

    Example:
        >>> space = NasBench201Space()
        >>> [len(decisions) for decisions in space.decisions.values()], space.decisions["cell"][2].candidates[:2]
        ([6], (('none', 1), ('skip_connect', 1)))
        >>> str(space.parse("nas_bench_201:9"))
        '|avg_pool_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|nor_conv_3x3~2|'
    """

    name: ClassVar[str] = "nas_bench_201"
    has_partial_channels: ClassVar[bool] = True

    ops: tuple[Operation, ...] = field(default=OPERATIONS)

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPERATIONS:
                raise _unknown_operation(op, "space.ops")
        if not self.ops or len(set(self.ops)) != len(self.ops):
            raise ConfigError(
                f"{list(self.ops)} is empty or names an operation twice",
                field="space.ops",
                remedy="give each operation once, at least one",
            )

    def make_decisions(self) -> list[Decision]:
        """Return the edges, on each of which one operation is chosen."""
        return [
            Decision(KIND, index, tuple((op, source) for op in self.ops), 1, edges=(0,) * len(self.ops))
            for index, (source, _) in enumerate(EDGES)
        ]

    def check_size(self, size: NetworkSize) -> None:
        """Check that the network has 3 stages of N >= 1 cells, and the stem for small pictures.

        Raises:
            ConfigError: If it does not.
        """
        if size.stem != "cifar":
            raise ConfigError(
                f"{size.stem} is not a stem of the space {self.name}, whose networks take small pictures",
                field="stem",
                remedy="set it to cifar, or set data.image_size to 64 or less",
            )
        if cells_per_stage(size.layers) is None:
            below = (size.layers - N_STAGES + 1) // N_STAGES * N_STAGES + N_STAGES - 1
            near = [layers for layers in (below, below + N_STAGES) if cells_per_stage(layers) is not None]
            raise ConfigError(
                f"{size.layers} is not 3 N + 2, the layers of a network with 3 stages of N cells and 2 residual blocks "
                f"between them, as {self.name} requires",
                field="layers",
                remedy=f"choose {' or '.join(map(str, near or [2 * N_STAGES - 1]))}",
            )

    def network(self, size: NetworkSize, choose: Choose) -> nn.Module:
        """Return the network, see `istanas.nets.nas_bench_201.NasBench201Network`."""
        from istanas.nets.nas_bench_201 import NasBench201Network

        self.check_size(size)
        return NasBench201Network(size, choose)

    def parse(self, text: str) -> Genotype | None:
        """Return the genotype of one of the benchmark's strings, or of `nas_bench_201:INDEX`.

        Raises:
            GenotypeError: If the text begins like one of these forms, but is not valid.
        """
        text = text.strip()
        if text.startswith("|"):
            return _genotype(_picks_of_string(text))
        if text.startswith(_PREFIX):
            return _genotype(_picks_of_string(_strings()[_index(text.removeprefix(_PREFIX))]))
        return None

    @classmethod
    def text(cls, genotype: Genotype) -> str | None:
        """Return the benchmark's string of a genotype, or `None` if the genotype is not in the benchmark."""
        picks = _single_picks(genotype)
        if picks is None:
            return None
        nodes = [
            "".join(
                f"{op}~{source}|" for (op, source), (_, end) in zip(picks, EDGES, strict=True) if end == node
            )
            for node in range(1, N_NODES)
        ]
        return "+".join(f"|{node}" for node in nodes)

    @classmethod
    def reference(cls, genotype: Genotype) -> str | None:
        """Return `nas_bench_201:INDEX` with the benchmark's index, or `None` if it has none."""
        text = cls.text(genotype)
        return None if text is None else f"{_PREFIX}{_indices()[text]}"

    def drawing(self, genotype: Genotype) -> Mapping[str, Drawing]:
        """Return the drawing of the cell: 4 nodes, and an edge for each operation.

        Raises:
            GenotypeError: If the genotype is not in the benchmark.
        """
        NasBench201Space().check(genotype)
        edges = tuple(
            (source, target, op, index, 0)
            for index, ((source, target), ((op, _),)) in enumerate(
                zip(EDGES, genotype.picks(KIND), strict=True)
            )
        )
        return {
            KIND: Drawing(
                ("input", "node 1", "node 2", "output"), edges, len(EDGES), frozenset({0, N_NODES - 1})
            )
        }


def cells_per_stage(layers: int) -> int | None:
    """Return the number N of cells in each stage of a network of 3 N + 2 layers, or `None` for another number.

    Example:
        >>> cells_per_stage(17), cells_per_stage(16), cells_per_stage(2)
        (5, None, None)
    """
    cells, rest = divmod(layers - N_STAGES + 1, N_STAGES)
    return cells if rest == 0 and cells >= 1 else None


def genotype_at(index: int) -> Genotype:
    """Return the genotype with an index of the benchmark.

    Args:
        index: 0 to 15,624.

    Raises:
        GenotypeError: If there is no such index.

    Example:
        >>> str(genotype_at(0))
        '|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|'
    """
    return _genotype(_picks_of_string(_strings()[_index(str(index))]))


def index_of(genotype: Genotype) -> int:
    """Return the index of a genotype in the benchmark, the inverse of `genotype_at`.

    Raises:
        GenotypeError: If the genotype is not in the benchmark.

    Example:
        >>> index_of(genotype_at(1234))
        1234
    """
    NasBench201Space().check(genotype)
    return _indices()[str(genotype)]


def _genotype(picks: Sequence[Pick]) -> Genotype:
    from istanas.space.genotype import Genotype

    return Genotype(space=NasBench201Space.name, choices=((KIND, tuple((pick,) for pick in picks)),))


def _single_picks(genotype: Genotype) -> list[Pick] | None:
    """Return the pick of each edge, or `None` if the genotype is not in the benchmark."""
    try:
        NasBench201Space().check(genotype)
    except GenotypeError:
        return None
    return [pick for (pick,) in genotype.picks(KIND)]


def _picks_of_string(text: str) -> list[Pick]:
    """Return the picks of one of the benchmark's strings.

    Raises:
        GenotypeError: If the text has another form or names an unknown operation.
    """
    nodes = text.split("+")
    if len(nodes) != N_NODES - 1:
        raise GenotypeError(
            f"{text!r:.60} has {len(nodes)} nodes, not {N_NODES - 1}", field="genotype", remedy=_FORM
        )
    picks = []
    for node, part in enumerate(nodes, 1):
        inputs = part[1:-1].split("|")
        if len(part) < 2 or part[0] != "|" or part[-1] != "|" or len(inputs) != node:
            raise GenotypeError(
                f"node {node} is {part!r:.60}, not {node} operations between |",
                field="genotype",
                remedy=_FORM,
            )
        picks += [_pick(node, state, each) for state, each in enumerate(inputs)]
    return picks


def _pick(node: int, state: int, text: str) -> Pick:
    op, mark, source = text.partition("~")
    if mark != "~" or source != str(state):
        raise GenotypeError(
            f"{text!r:.60} of node {node} is not OPERATION~{state}", field="genotype", remedy=_FORM
        )
    if op not in OPERATIONS:
        raise _unknown_operation(op, "genotype", GenotypeError)
    return op, state


def _unknown_operation(
    op: object, where: str, kind: type[ConfigError] | type[GenotypeError] = ConfigError
) -> ConfigError | GenotypeError:
    hint = did_you_mean(str(op)[:60], OPERATIONS)
    return kind(
        f"unknown operation {op!r:.60}{hint}", field=where, remedy=f"choose from {', '.join(OPERATIONS)}"
    )


def _index(text: str) -> int:
    if re.fullmatch("[0-9]{1,5}", text, re.ASCII) is None or int(text) >= N_CELLS:
        raise GenotypeError(
            f"{text!r:.60} is not an index of {NasBench201Space.name}",
            field="genotype",
            remedy=f"choose 0 to {N_CELLS - 1}",
        )
    return int(text)


@functools.cache
def _strings() -> tuple[str, ...]:
    """Return the strings of all cells, in the benchmark's order.

    The benchmark lists all combinations, the last edge fastest, and shuffles them with Python's generator.

    Source:
        `generate_meta_info` in the benchmark's code, which checks three of the strings. A test repeats these checks.
    """
    strings = []
    for a, b, c, d, e, f in itertools.product(OPERATIONS, repeat=len(EDGES)):
        strings.append(f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|")
    random.Random(_SHUFFLE_SEED).shuffle(strings)
    return tuple(strings)


@functools.cache
def _indices() -> dict[str, int]:
    return {text: index for index, text in enumerate(_strings())}


register_space(NasBench201Space)
