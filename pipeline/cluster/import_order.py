"""The order in which Ray's workers look for packages, if the working directory has packages of the same names.

Ray puts the driver's working directory in front of the paths of its workers. A user's folder `pipeline` there, which is
a common name, would hide the package of istanas.
"""

from __future__ import annotations

from pathlib import Path

from ray.job_config import JobConfig

PACKAGES = ("istanas", "pipeline")
HOME = Path(__file__).resolve().parents[2]
"""The folder that contains the packages."""


def hides_packages(folder: Path) -> bool:
    """Return whether a folder has packages with the names of those of istanas.

    Example:
        >>> hides_packages(HOME)
        False
    """
    return folder.resolve() != HOME and any((folder / name / "__init__.py").exists() for name in PACKAGES)


class OwnPackagesFirst(JobConfig):
    """A job whose workers find the packages of istanas before those of the working directory.

    A worker inserts the driver's paths one after the other at the front of `sys.path`, so the last one has precedence.
    Therefore `HOME` is appended after Ray has appended the working directory, which it does just before it calls
    `_serialize`. Both names are private in Ray; `test_an_installed_wheel_runs_beside_a_folder_named_pipeline` fails if
    they change.
    """

    def _serialize(self) -> str:
        if str(HOME) not in self._py_driver_sys_path:
            self._py_driver_sys_path.append(str(HOME))
        serialized: str = super()._serialize()
        return serialized
