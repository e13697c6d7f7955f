"""Commands of a user without a writable home folder."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runs.directory import RunDir

TINY = """
space: {nodes: 2}
search: {epochs: 1, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 100}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
# The first steps of ray.init.
TOKEN = """
import os, warnings
from pathlib import Path
from pipeline.base.home_folder import ensure_usable_home

warnings.simplefilter("always")
ensure_usable_home()
os.environ["RAY_AUTH_MODE"] = "token"
from ray._private.authentication import authentication_token_setup as ray_tokens

ray_tokens.ensure_token_if_auth_enabled()
print(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
"""
UNPRIVILEGED = [
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
]  # without it, root can write everywhere
# This user can read everything, because the interpreter may be anywhere.
NOBODY = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def as_user(
    command: list[str], folder: Path, home: Path | None, prefix: list[str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, which also contains its temporary files, with this home folder or none."""
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and there is no setpriv to take that right away")
    unset = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TMPDIR": str(folder), **({} if home is None else {"HOME": str(home)})}
    command = [*(prefix if os.getuid() == 0 else []), sys.executable, *command]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def substitute(folder: Path, user: int) -> Path:
    """The folder among the temporary files that replaces the home folder."""
    return folder / f"istanas-home-{user}"


@pytest.mark.parametrize("there", [True, False], ids=["itself", "a folder in it"])
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "may not be entered"])
def test_rays_token_goes_where_it_can_be_written(tmp_path: Path, there: bool, mode: int) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=mode)
    done = as_user(["-c", TOKEN], tmp_path, locked if there else locked / "home", UNPRIVILEGED)
    assert done.returncode == 0, done.stderr
    token = Path(done.stdout.strip())
    assert token.is_relative_to(substitute(tmp_path, os.getuid()))
    assert len(token.read_text()) >= 32
    assert f"{locked}" in done.stderr
    again = as_user(["-c", TOKEN], tmp_path, locked if there else locked / "home", UNPRIVILEGED)
    assert again.stdout == done.stdout
    assert stat.S_IMODE(substitute(tmp_path, os.getuid()).stat().st_mode) == 0o700


def test_commands_that_start_at_once_have_one_token(tmp_path: Path) -> None:
    """No process reads an incomplete token, or one that another process replaces."""
    code = "import sys; from pathlib import Path; from pipeline.base.home_folder import _write_once\n"
    code += "file = Path(sys.argv[1]); _write_once(file, sys.argv[2] * 32); print(file.read_text())"
    for trial in range(5):
        command = [sys.executable, "-c", code, str(tmp_path / f"token-{trial}")]
        started = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "abc"]
        read = {process.communicate(timeout=60)[0].strip() for process in started}
        assert read <= {"a" * 32, "b" * 32, "c" * 32}
        assert len(read) == 1
    assert len(list(tmp_path.iterdir())) == 5


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    done = as_user(["-c", TOKEN], tmp_path, tmp_path / "new", UNPRIVILEGED)
    assert done.stdout.strip() == str(tmp_path / "new" / ".ray" / "auth_token")
    assert "istanas-home" not in done.stderr


def test_a_token_in_a_read_only_home_is_used(tmp_path: Path) -> None:
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("a" * 32)
    token.parent.chmod(0o555)
    (tmp_path / "home").chmod(0o555)
    done = as_user(["-c", TOKEN], tmp_path, tmp_path / "home", UNPRIVILEGED)
    assert done.stdout.strip() == str(token), done.stderr


def test_a_folder_of_somebody_elses_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    substitute(tmp_path, os.getuid()).mkdir()
    substitute(tmp_path, os.getuid()).chmod(0o777)
    program = ["-m", "pipeline.cli", "results"]
    done = as_user(program, tmp_path, tmp_path / "locked" / "home", UNPRIVILEGED)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: HOME is {tmp_path}/locked/home: no such folder, and {tmp_path}/istanas-home-"
    )
    assert line.endswith("set HOME to a writable folder")


def test_a_user_without_home_and_name_runs_a_job(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can take the place of a user that the system does not know")
    (tmp_path / "tiny.yaml").write_text(TINY)
    tmp_path.chmod(0o777)
    done = as_user(["-m", "pipeline.cli", "search", "--config", "tiny.yaml"], tmp_path, None, NOBODY)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert lines[0].startswith("warning: HOME is not set, and this user has none; ")
    (path,) = (tmp_path / "runs").iterdir()
    assert RunDir(path).read().status == "FINISHED"
