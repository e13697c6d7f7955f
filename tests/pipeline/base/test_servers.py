"""A proxy in the environment that intercepts a local MLflow server, and a RAY_ADDRESS that directs jobs elsewhere."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from istanas.errors import ConfigError, IstanasError
from pipeline.base.servers import unreachable
from pipeline.cli.commands import run
from pipeline.cli.doctor import check_store
from pipeline.cluster.address import check_address
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.report import results_frame
from pipeline.tracking.ui import serve_ui
from tests.ports import unused_port


class Refuses(BaseHTTPRequestHandler):
    """A proxy that reaches no server."""

    def do_GET(self) -> None:
        self.send_error(502)

    do_POST = do_GET  # noqa: N815, the name is the library's

    def log_message(self, *_: object) -> None:
        pass


VARIABLES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture(params=[(name,) for name in VARIABLES], ids=VARIABLES)
def proxy(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The environment of a company network: all requests use a proxy that does not reach this machine's servers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("no_proxy", "NO_PROXY", *VARIABLES):
            monkeypatch.delenv(name, raising=False)
        for name in request.param:
            monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield f"127.0.0.1:{server.server_port} ({request.param[0]})"
        server.shutdown()


def test_who_reads_a_store_is_told_that_a_proxy_was_asked(
    proxy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"http://127.0.0.1:{unused_port()}"
    says = f"the proxy {proxy} is used for it, set NO_PROXY=127.0.0.1 to connect directly"
    check = check_store(store)
    assert check.state == "fail"
    assert says in check.message
    assert says in unreachable(store)
    with pytest.raises(ConfigError) as caught:
        results_frame(tracking_uri=store)
    assert says in str(caught.value)
    for command, code in (("results", 2), ("ui", 1), ("doctor", 1)):
        assert run([command, "--set", f"tracking.uri={store}"]) == code
        out, err = capsys.readouterr()
        assert f"{out}{err}".count(says) == 1, command
        assert "secret" not in f"{out}{err}"
    assert "secret" not in f"{check}{caught.value}"


@pytest.mark.parametrize("excepted", ["no_proxy", "NO_PROXY"])
def test_a_server_that_is_excepted_is_asked_itself(
    proxy: str, excepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setenv(excepted, "example.org")
    assert f"add 127.0.0.1 to {excepted} to connect directly" in unreachable(store)
    for host in ("127.0.0.1", "127.0.0.0/8"):
        monkeypatch.setenv(excepted, f"example.org,{host}")
        assert "proxy" not in unreachable(store)
    assert "proxy" not in check_store(store).message


@pytest.mark.parametrize("proxy", [VARIABLES], ids=["all variables"], indirect=True)
def test_pages_of_a_local_store_open_behind_a_proxy(proxy: str, tmp_path: Path, blank_database: Path) -> None:
    """Requests to the command's own server do not use the proxy."""
    store = f"sqlite:///{shutil.copy(blank_database, tmp_path)}"
    told: list[str] = []

    def announce(address: str, _store: str, _newest: str | None) -> None:
        told.append(address)
        raise KeyboardInterrupt  # as Ctrl-C does

    assert serve_ui(tracking_uri=store, port=unused_port(), announce=announce) == 0
    assert told


def test_ray_address_is_named_where_it_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{unused_port()}"
    with pytest.raises(IstanasError, match=r"^runtime.address: no process listens at '127"):
        check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(IstanasError, match=r"^RAY_ADDRESS: .*, or unset RAY_ADDRESS to start Ray"):
        check_address(address)
    assert Runtime(load(None, ["runtime.workers=1"]).runtime).address_from_environment == address
    elsewhere = load(None, ["runtime.workers=1", "runtime.address=head:1"]).runtime
    assert Runtime(elsewhere).address_from_environment is None
