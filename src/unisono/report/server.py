"""Serves the page of one run directory, and what has changed since a browser asked last. *Local.*

It only reads the run directory, so it serves a run on this machine and one on any other that writes to the same folder. It
listens on loopback alone, and answers only requests that name loopback: a foreign page cannot read a run through a host name that
resolves to loopback (DNS rebinding).
"""

from __future__ import annotations

import json
import os
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from unisono.errors import ConfigurationError
from unisono.report.page import POLICY, live_html, news, plotly_js
from unisono.report.run_data import RunReader
from unisono.report.run_page import Page, run_page

_HOSTS = ("127.0.0.1", "localhost")


class Dashboard(ThreadingHTTPServer):
    """A server of one run's page, in threads of its own; a context manager.

    Args:
        run_dir: The run directory, a path or an fsspec address; it may be empty, or not be there yet.
        port: Where to listen; 0: any free port.

    Raises:
        ConfigurationError: The port is taken, or Plotly is not installed.
    """

    daemon_threads = True

    def __init__(self, run_dir: str | os.PathLike[str], *, port: int = 0) -> None:
        plotly_js()
        self._reader, self._lock = RunReader(run_dir), threading.Lock()
        try:
            super().__init__((_HOSTS[0], port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen on port {port} of {_HOSTS[0]}: {error}. Leave out --port, and a free one is found."
            ) from error
        self._thread = threading.Thread(target=self.serve_forever, name="unisono-watch", daemon=True)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{_HOSTS[0]}:{self.server_address[1]}/"

    def page(self) -> Page:
        """What the page says now; read again whenever somebody asks, by one thread at a time."""
        with self._lock:
            return run_page(self._reader.read(), live=True)

    def __enter__(self) -> Self:
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop serving, and free the port."""
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard
    server_version = "unisono"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, its script, its news."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        address = urlsplit(self.path)
        if host not in _HOSTS:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "This page is for this machine alone.\n")
        elif address.path == "/":
            self._send(HTTPStatus.OK, "text/html", live_html(self.server.page()))
        elif address.path == "/plotly.js":
            self._send(HTTPStatus.OK, "text/javascript", plotly_js(), keep=True)
        elif address.path == "/state":
            told = news(self.server.page())
            if parse_qs(address.query).get("since") == [told["version"]]:
                self._send(HTTPStatus.NO_CONTENT)
            else:
                self._send(HTTPStatus.OK, "application/json", json.dumps(told, allow_nan=False, separators=(",", ":")))
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is only one page: /\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: browsers ask once a second."""

    def _send(self, status: HTTPStatus, kind: str | None = None, text: str = "", *, keep: bool = False) -> None:
        body = text.encode()
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=86400" if keep else "no-store")
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the reader has left
