"""Search spaces: their decisions and networks, candidate operations, genotypes and the published cells."""

from istanas.space.base import (
    DEFAULT_SPACE,
    SPACES,
    Decision,
    Drawing,
    NetworkSize,
    Pick,
    SearchSpace,
    kind_title,
    register_space,
    space_of,
)
from istanas.space.choice import ChoiceSpace
from istanas.space.genotype import (
    CELLS,
    Genotype,
    Picks,
    genotype_from_supports,
    random_genotype,
)
from istanas.space.literal import genotype_from_text, parsed_genotype
from istanas.space.nas_bench_201 import NasBench201Space
from istanas.space.operations import OPERATIONS, Operation, register_operation
from istanas.space.primitives import PRIMITIVES
from istanas.space.published import PUBLISHED
from istanas.space.topology import N_CELL_INPUTS, CellSpace, cell_drawing, state_name

__all__ = [
    "CELLS",
    "DEFAULT_SPACE",
    "N_CELL_INPUTS",
    "OPERATIONS",
    "PRIMITIVES",
    "PUBLISHED",
    "SPACES",
    "CellSpace",
    "ChoiceSpace",
    "Decision",
    "Drawing",
    "Genotype",
    "NasBench201Space",
    "NetworkSize",
    "Operation",
    "Pick",
    "Picks",
    "SearchSpace",
    "cell_drawing",
    "genotype_from_supports",
    "genotype_from_text",
    "kind_title",
    "parsed_genotype",
    "random_genotype",
    "register_operation",
    "register_space",
    "space_of",
    "state_name",
]
