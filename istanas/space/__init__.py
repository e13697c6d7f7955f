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
from istanas.space.operations import OPERATIONS, Operation, register_operation
from istanas.space.primitives import PRIMITIVES
from istanas.space.published import PUBLISHED
from istanas.space.topology import N_CELL_INPUTS, CellSpace

__all__ = [
    "CELLS",
    "N_CELL_INPUTS",
    "OPERATIONS",
    "PRIMITIVES",
    "PUBLISHED",
    "CellSpace",
    "Genotype",
    "Operation",
    "Pick",
    "Picks",
    "genotype_from_supports",
    "genotype_from_text",
    "random_genotype",
    "register_operation",
    "state_name",
]
