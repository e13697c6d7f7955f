"""Search spaces: their decisions and networks, candidate operations, genotypes and the published cells."""

from istanas.space.base import (
    DEFAULT_SPACE,
    SPACES,
    Decision,
    Drawing,
    NetworkSize,
    Pick,
    SearchSpace,
    register_space,
)
from istanas.space.choice import ChoiceSpace
from istanas.space.genotype import (
    CELLS,
    Genotype,
    Picks,
    genotype_from_supports,
    random_genotype,
    state_name,
)
from istanas.space.literal import genotype_from_text, parsed_genotype
from istanas.space.nas_bench_201 import NasBench201Space
from istanas.space.primitives import PRIMITIVES, Primitive
from istanas.space.published import PUBLISHED
from istanas.space.topology import N_CELL_INPUTS, CellSpace

__all__ = [
    "CELLS",
    "DEFAULT_SPACE",
    "N_CELL_INPUTS",
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
    "Pick",
    "Picks",
    "Primitive",
    "SearchSpace",
    "genotype_from_supports",
    "genotype_from_text",
    "parsed_genotype",
    "random_genotype",
    "register_space",
    "state_name",
]
