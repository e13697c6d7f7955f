"""Commands without the packages of an extra: one line with the remedy, before any work."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.base.extras import EXTRAS
from tests.in_process import istanas

TINY = ("search={epochs: 1, init_channels: 2, layers: 3}", "tracking.enabled=false")
SETTINGS = [part for setting in TINY for part in ("--set", setting)]
COMMANDS = [
    ("export", "run", ("run", "--config", "one_stage_digits", *SETTINGS[2:])),
    ("export", "--backend onnxruntime", ("latency", "--backend", "onnxruntime", "--out", "t.json")),
    ("export", "model.onnx", ("predict", "model.onnx", "picture.png")),
    ("clusters", "submit", ("submit", "--", "search", "--workers", "2", *SETTINGS)),
    ("clusters", "jobs", ("jobs",)),
    ("clusters", "stop", ("stop", "ID")),
    ("clusters", "runtime.workers", ("sweep", "--config", "sweep_digits", "--workers", "2", *SETTINGS)),
]


@pytest.mark.parametrize(("extra", "field", "command"), COMMANDS, ids=[command[2][0] for command in COMMANDS])
def test_a_command_without_its_extra_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, field: str, command: Sequence[str]
) -> None:
    for name in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, name, None)  # the import system treats it as not installed
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"")
    done = istanas(tmp_path, command, code=1)
    remedy = re.escape(f"run: pip install 'istanas[{extra}]'")
    assert re.fullmatch(rf"error: {field}: package \w+ cannot be used \(.*\); {remedy}\n", done.stderr)
