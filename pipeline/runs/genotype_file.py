"""`genotype.json` and the figures of its cells: written into a run directory, and read."""

from __future__ import annotations

from pathlib import Path

from istanas.draw import save_genotype_figures
from istanas.errors import GenotypeError
from istanas.limits import GENOTYPE_BYTES, read_at_most
from istanas.space import Genotype, genotype_from_text
from pipeline.base.files import atomic_write
from pipeline.runs.layout import CELLS_FOLDER, GENOTYPE_FILE


def read_genotype(file: Path) -> Genotype:
    """The genotype in a file.

    Raises:
        GenotypeError: it holds none; the message names the file.
    """
    try:
        return genotype_from_text(read_at_most(file, GENOTYPE_BYTES, pipe=True).decode())
    except UnicodeDecodeError:
        raise GenotypeError(f"{file}: is no text; give a file that holds a genotype") from None
    except (GenotypeError, ValueError) as error:
        raise GenotypeError(f"{file}: {error}") from None


def write_genotype(
    folder: Path, genotype: Genotype, weights: dict[str, list[list[float]]] | None = None
) -> None:
    """genotype.json and the four cell figures."""
    atomic_write(folder / GENOTYPE_FILE, genotype.to_json() + "\n")
    weights = weights or {}
    save_genotype_figures(
        genotype,
        folder / CELLS_FOLDER,
        weights_normal=weights.get("normal"),
        weights_reduce=weights.get("reduce"),
    )
