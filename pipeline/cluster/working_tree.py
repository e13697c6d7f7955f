"""The files that are shipped with a submitted job: code and configurations, but no data, runs or known secrets.

Ray's own packaging is not used, because it follows links, and does not exclude secrets, data and runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore import GitIgnorePatternError

from istanas.errors import ConfigError

IGNORE_FILES = (".gitignore", ".rayignore")  # respected in every folder, as in Ray
# Patterns of .gitignore: passwords, tokens, keys and licences, in any folder.
SECRET = (
    *(
        ".env",
        ".env.*",
        ".envrc",
        ".netrc",
        ".pypirc",
        ".git-credentials",
        "*credentials*.json",
        "auth_token",
    ),
    *(".ssh/", ".aws/", ".kube/", ".mlflow/", ".ray/", "**/.config/gcloud/"),
    *("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "id_ecdsa*", "*.tfstate*", "*.lic"),
)
NAMED_SECRETS = (  # variables that name a file with a secret
    "RAY_AUTH_TOKEN_PATH",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "MOSEKLM_LICENSE_FILE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
# A pattern begins with a slash if a Python package may contain a folder of that name.
NEVER = (
    *(
        ".git",
        ".hg/",
        ".svn/",
        ".venv/",
        "venv/",
        "/env/",
        "node_modules/",
        "*.egg-info/",
        "/build/",
        "/dist/",
    ),
    *("__pycache__/", "*.py[co]", ".*_cache/", ".hypothesis/", ".ipynb_checkpoints/", ".cache/", ".DS_Store"),
    *("/data/", "/runs/", "mlruns/", "mlartifacts/", "mlflow.db*", ".submitted/"),
    *SECRET,
)
ADDED = ".submitted"  # the package's folder of files from outside the working directory
MAX_BYTES = 100 * 1024**2  # limit of Ray's dashboard
MAX_FILES = 50_000  # stops the search if the working directory is a home folder, for example


@dataclass(frozen=True)
class Package:
    """The files to ship.

    Args:
        folder: The working directory.
        files: Name in the package -> file.
        links: Links to folders, which are not shipped.
        max_files: The largest accepted number of files.
    """

    folder: Path
    files: dict[str, Path]
    links: tuple[str, ...] = field(default=())
    max_files: int = MAX_FILES

    @property
    def size(self) -> int:
        """The size of all files in bytes, before compression."""
        return sum(file.stat().st_size for file in self.files.values())

    def add(self, file: Path) -> str:
        """Add a file from anywhere, and return its path relative to the job's working directory."""
        file = file.parent.resolve() / file.name  # in the form of the paths in `files`
        for name, packed in self.files.items():
            if packed == file:
                return name
        number = sum(name.startswith(f"{ADDED}/") for name in self.files)
        name = f"{ADDED}/{number}/{file.name}"  # The file's name is kept, because it is the name of the run.
        self.files[name] = file
        return name

    def check(self) -> None:
        """Reject a package that Ray would not accept, before it is written.

        Raises:
            ConfigError: The package has too many files, or is too large.
        """
        remedy = "list files that the job does not need in a .rayignore here, or submit from the folder of your code"
        if len(self.files) > self.max_files:
            problem = f"more than {self.max_files} files to ship"
            raise ConfigError(problem, field=str(self.folder), remedy=remedy)
        if self.size > MAX_BYTES:
            raise ConfigError(
                f"{megabytes(self.size)} to ship, above Ray's limit of {megabytes(MAX_BYTES)}; the largest parts are "
                f"{', '.join(self._largest())}",
                field=str(self.folder),
                remedy=remedy,
            )

    def _largest(self, most: int = 3) -> list[str]:
        sizes: Counter[str] = Counter()
        for name, file in self.files.items():
            *folders, last = name.split("/")
            sizes["/".join(folders[:2]) or last] += file.stat().st_size
        return [f"{name} ({megabytes(size)})" for name, size in sizes.most_common(most)]

    def write(self, file: Path) -> None:
        """Write a zip file. The same files give the same bytes, which Ray does not upload again."""
        with zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
        ) as archive:  # Some files are dated before 1980.
            for name, packed in sorted(self.files.items()):
                archive.write(packed, name)


def working_tree(folder: Path, not_shipped: Collection[Path] = (), *, max_files: int = MAX_FILES) -> Package:
    """Return the package of a folder.

    Args:
        folder: The working directory.
        not_shipped: Additional folders to leave out.
        max_files: The search stops after this number of files, and `Package.check` fails.

    Raises:
        ConfigError: The name of a file is not UTF-8.
        OSError: A folder cannot be read.
    """
    folder = folder.resolve()  # Resolved paths are compared below.
    named = [os.environ[name] for name in NAMED_SECRETS if os.environ.get(name)]
    stay = {path.expanduser().resolve() for path in (*not_shipped, *map(Path, named))}
    links: list[str] = []
    rules = [(folder, GitIgnoreSpec.from_lines(NEVER))]
    found = itertools.islice(_files(folder, rules, stay, links), max_files + 1)
    files = {_portable(path.relative_to(folder)): path for path in found}
    shown_links = tuple(_portable(Path(link).relative_to(folder)) for link in links)
    return Package(folder, files, shown_links, max_files)


def _portable(path: Path) -> str:
    name = path.as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "a file name that is not UTF-8 cannot be shipped",
            field=repr(name),
            remedy="rename the file, or list it in a .rayignore",
        ) from None
    return name


def _ignored(file: Path) -> GitIgnoreSpec:
    """Return the rules of a file. As in git, invalid lines are skipped."""
    lines = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(GitIgnorePatternError):
            GitIgnoreSpec.from_lines([line])
            lines.append(line)
    return GitIgnoreSpec.from_lines(lines)


def _leads_to_excluded(link: Path, base: Path, stay: set[Path]) -> bool:
    """Return whether a link points to a secret, or into data or runs."""
    target = link.resolve()
    if not stay.isdisjoint((target, *target.parents)):
        return True
    if target.is_relative_to(base):
        return GitIgnoreSpec.from_lines(NEVER).match_file(target.relative_to(base).as_posix())
    return GitIgnoreSpec.from_lines(SECRET).match_file(target.relative_to("/").as_posix())


def _files(
    folder: Path, rules: list[tuple[Path, GitIgnoreSpec]], stay: set[Path], links: list[str]
) -> Iterator[Path]:
    rules = rules + [
        (folder, _ignored(file)) for file in (folder / name for name in IGNORE_FILES) if file.is_file()
    ]
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, is_folder = Path(entry.path), entry.is_dir()
        if path in stay:
            continue
        end = "/" if is_folder else ""
        if any(spec.match_file(f"{path.relative_to(base).as_posix()}{end}") for base, spec in rules):
            continue
        if not is_folder:
            secret = entry.is_symlink() and _leads_to_excluded(path, rules[0][0], stay)
            if entry.is_file() and not secret:  # no sockets, pipes or broken links
                yield path
        elif entry.is_symlink():  # Most links to folders point to data.
            links.append(entry.path)
        else:
            yield from _files(path, rules, stay, links)


def megabytes(size: int) -> str:
    """Return a size in megabytes, for messages.

    Example:
        >>> megabytes(1_234_567)
        '1.2 MB'
    """
    return f"{size / 1e6:.1f} MB"
