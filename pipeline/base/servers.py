"""Tests of whether a server answers, and of whether a proxy of the environment is used for it."""

import http.client
import os
import socket
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

SECONDS_TO_CONNECT = 5.0
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
ANSWERS = (200, 401, 403)  # status codes of a server that answers, possibly requiring a password


def unreachable(uri: str) -> str:
    """Return why a store's server does not answer; "" if it does, or if the store is not a server.

    MLflow's own client would retry for minutes.
    """
    try:
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https"):
            code = _health(f"{uri.rstrip('/')}/health")
            if code in ANSWERS:
                return ""
            return (
                f"it answers with HTTP status {code}, which an MLflow server does not return{by_proxy(uri)}"
            )
        port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
        if parts.hostname and port:
            socket.create_connection((parts.hostname, port), timeout=SECONDS_TO_CONNECT).close()
    except urllib.error.URLError as error:
        return (getattr(error.reason, "strerror", None) or str(error.reason)) + by_proxy(uri)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__) + by_proxy(uri)
    return ""


def by_proxy(uri: str) -> str:
    """Return a hint that a proxy of the environment is used for a server, with the remedy; "" if none is.

    Example:
        >>> by_proxy("sqlite:///mlflow.db")
        ''
    """
    name, proxy = _proxy_of(uri)
    if not proxy:
        return ""
    host = urlsplit(uri).hostname
    shown = proxy.rpartition("@")[2].rpartition("//")[2].rstrip("/")  # without credentials
    excepted = next((name for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)), None)
    remedy = f"set NO_PROXY={host}" if excepted is None else f"add {host} to {excepted}"
    return f"; the proxy {shown} ({name}) is used for it, {remedy} to connect directly"


def _proxy_of(uri: str) -> tuple[str, str]:
    """Return the variable that sets the proxy of MLflow's client for a server, and the proxy; "" if there is none.

    The client uses requests, whose rules differ from urllib's: it supports ALL_PROXY, and networks in NO_PROXY.
    """
    from requests.utils import get_environ_proxies, select_proxy

    try:
        scheme = urlsplit(uri).scheme
        proxy = select_proxy(uri, get_environ_proxies(uri)) if scheme in ("http", "https") else None
    except ValueError:  # an invalid IPv6 address
        return "", ""
    if not proxy:
        return "", ""
    names = (name for kind in (f"{scheme}_proxy", "all_proxy") for name in (kind, kind.upper()))
    return next((name for name in names if os.environ.get(name)), "of the system's settings"), proxy


def _health(url: str) -> int:
    context = None
    if url.startswith("https"):  # with the certificates that MLflow's client trusts
        context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS") == "true":
            context = ssl._create_unverified_context()
    try:
        _, proxy = _proxy_of(url)
        handlers = [
            urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}),
            urllib.request.HTTPSHandler(context=context),
        ]
        with urllib.request.build_opener(*handlers).open(url, timeout=SECONDS_TO_CONNECT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
