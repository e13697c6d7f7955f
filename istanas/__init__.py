"""ISTA-NAS: neural architecture search as sparse coding (algorithms only; see `pipeline` for jobs and tracking)."""

from istanas.errors import IstanasError

__version__ = "0.1.0"
__all__ = ["IstanasError", "__version__"]
