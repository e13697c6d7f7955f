"""The search space: the topology of a cell, candidate operations, genotypes and the published cells."""

from istanas.space.genotype import (
    CELLS,
    Genotype,
    Pick,
    Picks,
    genotype_from_supports,
    random_genotype,
    state_name,
)
from istanas.space.literal import genotype_from_text
from istanas.space.primitives import PRIMITIVES, Primitive
from istanas.space.published import PUBLISHED
from istanas.space.topology import N_CELL_INPUTS, CellSpace

__all__ = [
    "CELLS",
    "N_CELL_INPUTS",
    "PRIMITIVES",
    "PUBLISHED",
    "CellSpace",
    "Genotype",
    "Pick",
    "Picks",
    "Primitive",
    "genotype_from_supports",
    "genotype_from_text",
    "random_genotype",
    "state_name",
]
