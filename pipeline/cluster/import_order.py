"""The order in which Ray's workers look for packages, if the working directory has packages of the same names.

Ray puts the driver's working directory in front of the paths of its workers. A user's folder `pipeline` there, which is
a common name, would hide the package of istanas.
"""

from __future__ import annotations

from pathlib import Path

from ray.job_config import JobConfig

PACKAGES = ("istanas", "pipeline")
HOME = Path(__file__).resolve().parents[2]


def hides_packages(folder: Path) -> bool:
    """Return whether a folder has packages with the names of those of istanas.

    Example:
        >>> hides_packages(HOME)
        False
    """
    return folder.resolve() != HOME and any((folder / name / "__init__.py").exists() for name in PACKAGES)


class OwnPackagesFirst(JobConfig):
    """A job whose workers find the packages of istanas before those of the working directory.

    Each worker inserts the paths one by one in front of its own, so that the last one precedes the others. Ray adds the
    working directory just before the configuration is serialized, therefore the path is added then.
    """

    def _serialize(self) -> str:
        self._py_driver_sys_path.append(str(HOME))
        serialized: str = super()._serialize()
        return serialized
