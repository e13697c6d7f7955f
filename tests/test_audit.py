"""`make audit`: pip-audit with a local database that speaks OSV's protocol, and its message where there is none."""

import datetime
import importlib.util
import json
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FINDING = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "aliases": ["CVE-2030-0001"],
    "modified": "2030-01-01T00:00:00Z",
    "published": "2030-01-01T00:00:00Z",
    "schema_version": "1.6.0",
    "summary": "it is broken",
    "details": "it is broken",
    "affected": [
        {
            "package": {"name": "click", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """A database with one vulnerability, of click."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = [FINDING] if query["package"]["name"] == "click" else []
        answer = json.dumps({"vulns": found} if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Database)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def audit(root: Path, folder: Path, pins: str, url: str, accepted: str = "") -> tuple[int, list[str]]:
    (folder / "pins.txt").write_text(f"# a comment\n{pins}\n")
    (folder / "accepted.toml").write_text(accepted)
    files = ["--constraints", str(folder / "pins.txt"), "--accepted", str(folder / "accepted.toml")]
    command = [sys.executable, str(root / ".ci" / "audit.py"), *files, "--osv-url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


PINS = "click==8.5.0\nrequests==2.34.2"
FOUND = "click 8.5.0: CVE-2030-0001 GHSA-aaaa-bbbb-cccc; fixed in: 99.0"


@pytest.mark.slow
def test_a_finding_fails_unless_it_is_accepted_for_now(
    repo_root: Path, tmp_path: Path, database: str
) -> None:
    code, lines = audit(repo_root, tmp_path, PINS, database)
    assert (code, lines) == (1, [f"audit: found: {FOUND}", "audit: 2 of 2 releases audited"])
    reason = '[CVE-2030-0001]\nreason = "we never call it"\nuntil = {}\n'
    code, lines = audit(repo_root, tmp_path, PINS, database, reason.format("2999-12-31"))
    accepted = f"audit: accepted until 2999-12-31: {FOUND}: we never call it"
    assert (code, lines) == (0, [accepted, "audit: 2 of 2 releases audited"])


def test_an_acceptance_ends_on_its_day(repo_root: Path) -> None:
    """Called in this process: each start of pip-audit takes seconds."""
    spec = importlib.util.spec_from_file_location("audit", repo_root / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    vulnerability = {"id": "CVE-2030-0001", "aliases": ["GHSA-aaaa-bbbb-cccc"], "fix_versions": ["99.0"]}
    report = [{"name": "click", "version": "8.5.0", "vulns": [vulnerability]}]
    accepted = {"CVE-2030-0001": {"reason": "we never call it", "until": datetime.date(2030, 5, 1)}}
    lines, bad = script.judged(report, accepted, datetime.date(2030, 4, 30))
    assert (lines[0], bad) == (f"accepted until 2030-05-01: {FOUND}: we never call it", False)
    lines, bad = script.judged(report, accepted, datetime.date(2030, 5, 1))
    assert (lines[0], bad) == (f"found: {FOUND}; was accepted until 2030-05-01", True)


@pytest.mark.slow
def test_without_a_database_it_says_that_nothing_was_audited(repo_root: Path, tmp_path: Path) -> None:
    code, lines = audit(repo_root, tmp_path, PINS, "http://127.0.0.1:9")
    assert code == 0
    assert lines == ["audit: NOT DONE: no vulnerability database answers; nothing is known of 2 releases"]


def test_what_is_accepted_has_a_reason_and_a_day(repo_root: Path) -> None:
    for name, entry in tomllib.loads((repo_root / ".ci" / "audit_accepted.toml").read_text()).items():
        assert set(entry) == {"reason", "until"}, name
        assert len(entry["reason"]) > 20
        assert isinstance(entry["until"], datetime.date)
