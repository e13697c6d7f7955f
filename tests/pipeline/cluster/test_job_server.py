"""The job server's client without a cluster: other kinds of servers, tokens, and the end of jobs."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.cli.commands import run
from pipeline.cluster.job_server import TOKEN_MISSING

Answer = tuple[int, str]
UNAUTHORIZED = (401, f"Unauthorized: {TOKEN_MISSING}")


class Server:
    """An HTTP server with the answers of a test, which records the requests and their tokens."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.needs_token = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                code, text = outer.answers.get(self.path, (404, "not found"))
                if outer.needs_token and self.headers.get("Authorization") is None:
                    code, text = UNAUTHORIZED
                self.send_response(code)
                if code in (301, 302, 307):
                    self.send_header("Location", text)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    server = Server()
    yield server
    server.close()


@pytest.fixture
def says(server: Server, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs a command for the server, and returns its exit code and its only line on stderr."""

    def said(*arguments: str) -> tuple[int, str]:
        code = run([*arguments, "--address", server.address])
        (line,) = capsys.readouterr().err.splitlines()
        return code, line

    return said


Says = Callable[..., tuple[int, str]]


# ---------- tokens
@pytest.mark.parametrize("token", ["SECRETabc\nSECRETdef", "SECRETabc def", "SECRET\u20ac", "SECRET\xe9"])
def test_an_invalid_token_is_rejected_and_not_shown(
    server: Server, says: Says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str
) -> None:
    server.needs_token = True
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    wrong = "not a token, which is one line of ASCII; set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    assert says("jobs") == (2, f"error: RAY_AUTH_TOKEN: {wrong}")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    for content in (token.encode(), b"\xff\xfe\x00SECRET", b"\n"):
        file.write_bytes(content)
        assert says("jobs") == (2, f"error: RAY_AUTH_TOKEN_PATH ({file}): {wrong}")


def test_a_token_is_sent_only_to_a_server_that_requests_it_in_rays_words(
    server: Server, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "SECRET")
    for answer in ((401, "Unauthorized"), (403, "Forbidden"), (302, f"{server.address}/elsewhere")):
        server.answers = {"/api/version": answer, "/elsewhere": UNAUTHORIZED}
        code, line = says("jobs")
        assert (code, f"no Ray job server answers at {server.address} (HTTP {answer[0]})" in line) == (
            1,
            True,
        ), line
    assert server.asked == [("/api/version", None)] * 3
    server.answers = {"/api/version": (307, f"{server.address}/elsewhere"), "/elsewhere": (200, "{}")}
    server.needs_token = True
    says("jobs")
    assert server.asked[3:] == [("/api/version", None), ("/api/version", "Bearer SECRET")]


def test_ray_requests_a_token_in_these_words() -> None:
    from ray._private.authentication import http_token_authentication

    assert TOKEN_MISSING in Path(http_token_authentication.__file__).read_text()


def test_a_required_token_that_is_turned_off_is_reported(
    server: Server, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.needs_token = True
    monkeypatch.setenv("RAY_AUTH_TOKEN", "SECRET")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, line = says("jobs")
    assert code == 1
    assert line == (
        f"error: RAY_AUTH_MODE: 'disabled', but the cluster at {server.address} requires its token; set it to token, "
        "or unset it"
    )
    assert [token for _, token in server.asked] == [None]


# ---------- jobs
def details(status: str, code: int | None = None) -> str:
    job = {"type": "SUBMISSION", "submission_id": "digits", "status": status, "entrypoint": "x"}
    return json.dumps({**job, "start_time": 1000, "driver_exit_code": code})


@pytest.fixture
def ray(server: Server) -> Server:
    version = {"version": "4", "ray_version": "2.50.0", "ray_commit": "x", "session_name": "x"}
    server.answers["/api/version"] = (200, json.dumps(version))
    return server


@pytest.mark.parametrize("job_id", ["", "../version", "a/b", "a?b"])
@pytest.mark.parametrize("command", ["jobs", "stop"])
def test_an_impossible_name_of_a_job_is_rejected(ray: Server, says: Says, command: str, job_id: str) -> None:
    code, line = says(command, job_id)
    assert code == 2
    assert line == (
        f"error: ID: no job {job_id!r} at {ray.address}; list the jobs: istanas jobs --address {ray.address}"
    )


@pytest.mark.parametrize("answer", ["[1]", "{}", "null", "<html>", '{"status": "BOGUS"}', '{"status": null}'])
def test_an_answer_of_another_kind_is_a_one_line_error(ray: Server, says: Says, answer: str) -> None:
    ray.answers["/api/jobs/digits"] = (200, answer)
    code, line = says("jobs", "digits")
    assert code == 1
    assert line.startswith(f"error: {ray.address} does not answer as Ray's job server does (")


def test_the_end_of_a_job_is_noticed_without_its_log(ray: Server, capsys: pytest.CaptureFixture[str]) -> None:
    log = "epoch 1\nepoch 2\n"
    ray.answers["/api/jobs/digits"] = (200, details("SUCCEEDED", 0))
    ray.answers["/api/jobs/digits/logs"] = (200, json.dumps({"logs": log}))
    asked = ["jobs", "digits", "--follow", "--address", ray.address]  # and /logs/tail answers 404
    assert run(asked) == 0
    assert capsys.readouterr().out == f"{log}digits: SUCCEEDED, exit code 0\n"
    ray.answers["/api/jobs/digits"] = (200, details("FAILED", 3))
    ray.answers["/api/jobs/digits/logs"] = (500, "no such file")
    assert run(asked) == 3
    out = capsys.readouterr().out
    assert f"the rest of the log cannot be read: {ray.address}: " in out
    assert out.endswith("\ndigits: FAILED, exit code 3; submit the same command again to resume\n")


@pytest.mark.parametrize(
    ("number", "code", "what"),
    [(signal.SIGTERM, 143, "terminated (SIGTERM)"), (signal.SIGINT, 130, "interrupted")],
)
def test_detaching_from_a_job_prints_how_to_attach_again(
    ray: Server, capsys: pytest.CaptureFixture[str], number: int, code: int, what: str
) -> None:
    ray.answers["/api/jobs/digits"] = (200, details("RUNNING"))

    def interrupt() -> None:
        # The second request shows that the loop runs. Ray adds a token if an earlier test of this process used one.
        while [path for path, _ in ray.asked].count("/api/jobs/digits/logs/tail") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run(["jobs", "digits", "--follow", "--address", ray.address]) == code
    thread.join()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{what}: detached, digits continues. Attach again: ")
    for hint in ("jobs digits --follow", "stop digits"):
        assert f"{hint} --address {ray.address}" in line
