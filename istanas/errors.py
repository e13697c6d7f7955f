"""The errors that the package raises on purpose: each message is one line with field, value and remedy."""


class IstanasError(Exception):
    """Base class: whoever catches this catches every error that the project raises on purpose."""


class ConfigError(IstanasError):
    """A configuration, an argument, or a combination of them that cannot work. Exit code 2."""


class DataError(IstanasError):
    """A data set that is missing, broken, or not what the configuration says."""


class GenotypeError(IstanasError):
    """A genotype that is not one: unknown op, state out of range, wrong version."""


class SolverError(IstanasError):
    """A LASSO solver that cannot run or was given something that is not a problem."""


class DivergedError(IstanasError):
    """Training that has no use any more: a loss or parameters that are no numbers, or a loss beyond its bound."""


class CheckpointError(IstanasError):
    """A checkpoint that is missing, broken, or of another run."""
