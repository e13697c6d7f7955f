"""`genotype.json` and the drawings of its cells in a run directory."""

from __future__ import annotations

from pathlib import Path

from istanas.draw import save_genotype_figures
from istanas.errors import GenotypeError
from istanas.limits import GENOTYPE_BYTES, read_at_most
from istanas.space import Genotype, genotype_from_text
from pipeline.base.files import atomic_write
from pipeline.runs.layout import CELLS_FOLDER, GENOTYPE_FILE


def read_genotype(file: Path) -> Genotype:
    """Read the genotype in a file.

    Raises:
        GenotypeError: the file holds no genotype.
    """
    try:
        return genotype_from_text(read_at_most(file, GENOTYPE_BYTES, pipe=True).decode())
    except UnicodeDecodeError:
        raise GenotypeError(
            "is not a text file", source=str(file), remedy="give a file that holds a genotype"
        ) from None
    except GenotypeError as error:
        raise error.in_source(str(file)) from None
    except ValueError as error:
        raise GenotypeError(
            str(error), source=str(file), remedy="give a file that holds a genotype"
        ) from None


def write_genotype(
    folder: Path, genotype: Genotype, weights: dict[str, list[list[float]]] | None = None
) -> None:
    """Write `genotype.json` and the drawings of its cells.

    Args:
        folder: The run directory.
        genotype: The genotype.
        weights: Weights of the edges by cell, drawn as line widths.
    """
    atomic_write(folder / GENOTYPE_FILE, genotype.to_json() + "\n")
    save_genotype_figures(genotype, folder / CELLS_FOLDER, weights=weights)
