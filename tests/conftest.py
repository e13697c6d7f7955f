"""The environment of every test (one thread, no usage statistics, no MLflow server) and the common fixtures."""

import os
import shutil
import signal
import sys
from pathlib import Path

import psutil

# A shell's background jobs ignore Ctrl-C, and every process that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before torch is imported, also for subprocesses: workers times threads must not exceed the cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(
    DO_NOT_TRACK="true", MLFLOW_DISABLE_TELEMETRY="true", RAY_USAGE_STATS_ENABLED="0", MPLBACKEND="Agg"
)
# Without cached bytecode, each of several hundred processes would compile all modules, and pytest rewrite all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A developer's MLflow server must not receive the tests' runs.
for _name in [n for n in os.environ if n.startswith("MLFLOW_") and n != "MLFLOW_DISABLE_TELEMETRY"]:
    del os.environ[_name]

_MEMORY_DISK = Path("/dev/shm")  # tmpfs on Linux
_ROOM = 8 * 2**30  # Bytes; the tests write 1 GB.


def _has_room(folder: Path) -> bool:
    """Return whether programs can be written to a folder and started there, and it has room for the tests."""
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return False
    return min(shutil.disk_usage(folder).free, psutil.virtual_memory().available) >= _ROOM


# Commits of SQLite and writes of checkpoints wait for the disk: without a disk, many tests take a quarter less time.
if sys.platform == "linux" and _has_room(_MEMORY_DISK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY_DISK))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# No deadline, since a test may be slow on a busy machine; the same examples in every run of a commit.
settings.register_profile("istanas", deadline=None, derandomize=True)
settings.load_profile("istanas")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests only first, so that no test process is left alone with one of them at the end."""
    mixed = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in mixed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write how many inputs each loader was given; xdist drops what the tests themselves print."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "fuzz":
                terminalreporter.write_line(f"fuzz: {value}")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top level of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden files and data outside of the repository; skips the test if it is missing."""
    folder = Path(os.environ.get("ISTANAS_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"shared files: no folder {folder}; set ISTANAS_SHARED to the folder that holds golden/")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """The results of the published implementation; skips the test if they are missing."""
    folder = shared_dir / "golden"
    if not folder.is_dir():
        pytest.skip(f"golden files: no folder {folder}; set ISTANAS_SHARED to the folder that holds golden/")
    return folder


@pytest.fixture(scope="session")
def blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to be copied, since creating one takes seconds."""
    from pipeline.tracking.store import open_client

    file = tmp_path_factory.mktemp("blank") / "mlflow.db"
    open_client(f"sqlite:///{file}").search_experiments()
    return file
