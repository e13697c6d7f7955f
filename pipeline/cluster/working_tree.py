"""What goes along with a submitted job: code and configurations of the working folder; no data, runs, known secrets."""

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

IGNORE_FILES = (".gitignore", ".rayignore")  # obeyed in every folder, as Ray does
# In .gitignore's language: passwords, tokens, keys and licences, wherever they lie.
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
NAMED_SECRETS = (  # variables that name a file with one
    "RAY_AUTH_TOKEN_PATH",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "MOSEKLM_LICENSE_FILE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
# Anchored where a package may have a folder of that name.
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
ADDED = ".submitted"  # where files from elsewhere lie in the parcel
MAX_BYTES = 100 * 1024**2  # the most that Ray's dashboard takes
MAX_FILES = 50_000  # looked at: someone's whole home is no working directory


@dataclass(frozen=True)
class Parcel:
    """The files of a parcel.

    Args:
        folder: whose files they are.
        files: name in the parcel -> file.
        links: folders that are links, which are not followed.
    """

    folder: Path
    files: dict[str, Path]
    links: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        """Bytes of all files, before they are compressed."""
        return sum(file.stat().st_size for file in self.files.values())

    def add(self, file: Path) -> str:
        """Take a file along, wherever it lies; its name in the parcel, relative to the job's working directory."""
        file = file.parent.resolve() / file.name  # as the files of the folder are spelt
        for name, packed in self.files.items():
            if packed == file:
                return name
        number = sum(name.startswith(f"{ADDED}/") for name in self.files)
        name = f"{ADDED}/{number}/{file.name}"  # the file's own name is the run's
        self.files[name] = file
        return name

    def check(self) -> None:
        """Refuse what Ray would not take, before it is packed.

        Raises:
            ConfigError: with the largest folders and the remedy.
        """
        remedy = (
            "name what the job does not need in a .rayignore here, or submit from the folder of your code"
        )
        if len(self.files) > MAX_FILES:
            raise ConfigError(f"{self.folder}: holds more than {MAX_FILES} files to ship: {remedy}")
        if self.size > MAX_BYTES:
            raise ConfigError(
                f"{self.folder}: {megabytes(self.size)} to ship, Ray takes at most {megabytes(MAX_BYTES)}; most is in "
                f"{', '.join(self._largest())}: {remedy}"
            )

    def _largest(self, most: int = 3) -> list[str]:
        sizes: Counter[str] = Counter()
        for name, file in self.files.items():
            *folders, last = name.split("/")
            sizes["/".join(folders[:2]) or last] += file.stat().st_size
        return [f"{name} ({megabytes(size)})" for name, size in sizes.most_common(most)]

    def write(self, file: Path) -> None:
        """Pack it: the same files give the same bytes, which Ray then has already."""
        with zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
        ) as archive:  # years before 1980 exist
            for name, packed in sorted(self.files.items()):
                archive.write(packed, name)


def working_tree(folder: Path, not_shipped: Collection[Path] = ()) -> Parcel:
    """What of a folder goes along.

    Args:
        folder: the working directory.
        not_shipped: folders that stay here, beside those that always do.

    Raises:
        ConfigError: a file's name is not UTF-8.
        OSError: a folder that can't be read.
    """
    folder = folder.resolve()  # paths below are compared as they really are
    named = [os.environ[name] for name in NAMED_SECRETS if os.environ.get(name)]
    stay = {path.expanduser().resolve() for path in (*not_shipped, *map(Path, named))}
    links: list[str] = []
    rules = [(folder, GitIgnoreSpec.from_lines(NEVER))]
    found = itertools.islice(_files(folder, rules, stay, links), MAX_FILES + 1)
    files = {_portable(path.relative_to(folder)): path for path in found}
    return Parcel(folder, files, tuple(_portable(Path(link).relative_to(folder)) for link in links))


def _portable(path: Path) -> str:
    name = path.as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name!r}: a file name that is not UTF-8 can't be shipped, rename it or name it in a .rayignore"
        ) from None
    return name


def _ignored(file: Path) -> GitIgnoreSpec:
    """The rules of a file; a line that is no pattern ignores nothing, as in git."""
    lines = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(GitIgnorePatternError):
            GitIgnoreSpec.from_lines([line])
            lines.append(line)
    return GitIgnoreSpec.from_lines(lines)


def _leads_to_what_stays(link: Path, base: Path, stay: set[Path]) -> bool:
    """Whether a linked file is a secret, or lies among data or runs."""
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
            secret = entry.is_symlink() and _leads_to_what_stays(path, rules[0][0], stay)
            if entry.is_file() and not secret:  # nor sockets, pipes, or links to nowhere
                yield path
        elif entry.is_symlink():  # to data, as a rule
            links.append(entry.path)
        else:
            yield from _files(path, rules, stay, links)


def megabytes(size: int) -> str:
    """A size for people.

    Example:
        >>> megabytes(1_234_567)
        '1.2 MB'
    """
    return f"{size / 1e6:.1f} MB"
