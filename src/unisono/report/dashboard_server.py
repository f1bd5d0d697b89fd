"""Serves the page of one run directory, and what has changed since a browser asked last. *Local.*

It only reads the run directory, so it serves a run on this machine and one on any other that writes to the same folder. It
listens on loopback alone, and answers only requests that name loopback: nobody else's page can read a run through a host name of
its own that leads here.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

from unisono.errors import ConfigurationError
from unisono.report.page import live_html, news, plotly_js
from unisono.report.run_data import RunReader
from unisono.report.run_page import run_page

_HOSTS = ("127.0.0.1", "localhost")
_POLICY = "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"


class Dashboard:
    """A server of one run's page, in threads of its own; a context manager.

    Args:
        run_dir: The run directory, a path or an fsspec address; it may be empty, or not be there yet.
        port: Where to listen; 0: any free port.

    Raises:
        ConfigurationError: The port is taken, or Plotly is not installed.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, port: int = 0) -> None:
        plotly_js()
        state = _State(RunReader(run_dir))
        try:
            self._server = ThreadingHTTPServer((_HOSTS[0], port), _handler(state))
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen on port {port} of {_HOSTS[0]}: {error}. Leave out --port, and a free one is found."
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="unisono-watch", daemon=True)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{_HOSTS[0]}:{self._server.server_address[1]}/"

    def __enter__(self) -> Dashboard:
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop serving, and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _State:
    """What the page says now; read again whenever somebody asks, by one thread at a time."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()

    def page(self) -> str:
        with self._lock:
            page = run_page(self._reader.read(), live=True)
        body = news(page, version="")
        return live_html(page, version=_version(body))

    def news(self, since: str) -> bytes | None:
        """What to show instead of version ``since``; None if nothing has changed."""
        with self._lock:
            page = run_page(self._reader.read(), live=True)
        body = news(page, version="")
        version = _version(body)
        if version == since:
            return None
        return json.dumps({**body, "version": version}, allow_nan=False, separators=(",", ":")).encode()


def _version(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, allow_nan=False, sort_keys=True).encode()).hexdigest()[:16]


def _handler(state: _State) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "unisono"
        sys_version = ""
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """The page, its script, its news."""
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in _HOSTS:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"This page is for this machine alone.\n")
                return
            address = urlsplit(self.path)
            if address.path == "/":
                self._send(HTTPStatus.OK, "text/html", state.page().encode())
            elif address.path == "/plotly.js":
                self._send(HTTPStatus.OK, "text/javascript", plotly_js().encode(), keep=True)
            elif address.path == "/state":
                body = state.news(parse_qs(address.query).get("since", [""])[0])
                if body is None:
                    self._send(HTTPStatus.NO_CONTENT, None, b"")
                else:
                    self._send(HTTPStatus.OK, "application/json", body)
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"There is only one page: /\n")

        def log_message(self, format: str, *args: object) -> None:
            """Nobody wants a line a second on the terminal."""

        def _send(self, status: HTTPStatus, kind: str | None, body: bytes, *, keep: bool = False) -> None:
            self.send_response(status)
            if kind is not None:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "max-age=86400" if keep else "no-store")
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the reader has left

    return Handler
