from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import summary, write_run
from unisono.errors import ConfigurationError
from unisono.report.server import Dashboard


class Browser:
    """Asks a dashboard."""

    def __init__(self, address: str) -> None:
        self.host = address.removeprefix("http://").rstrip("/")

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def news(self, since: str = "") -> dict[str, Any] | None:
        status, _, body = self.get(f"/state?since={since}")
        assert status in (200, 204)
        return json.loads(body) if status == 200 else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def browser(folder: Path) -> Iterator[Browser]:
    with Dashboard(folder) as dashboard:
        yield Browser(dashboard.address)


def test_a_page_follows_its_run_from_nothing_to_the_end(folder: Path, browser: Browser) -> None:
    assert b"Nothing has been logged" in browser.get("/")[2]
    empty = browser.news()
    assert empty is not None
    assert browser.news(empty["version"]) is None

    write_run(folder, steps=20, ended=False)
    first = browser.news(empty["version"])
    assert first is not None
    assert "Training, step 20" in first["head"]
    loss = next(section for section in first["sections"] if section["key"] == "loss")
    assert loss["figure"]["data"][0]["x"][-1] == 20

    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.5}\n{"step": 22, "lo')
    second = browser.news(first["version"])
    assert second is not None
    assert "Training, step 21" in second["head"]
    assert second["ended"] is False

    (folder / "summary.json").write_text(json.dumps(summary(21)))
    last = browser.news(second["version"])
    assert last is not None
    assert last["ended"] is True
    assert "Trained in unison" in last["head"]


def test_a_damaged_run_is_shown_as_far_as_it_goes(folder: Path, browser: Browser) -> None:
    write_run(folder, steps=20)
    (folder / "summary.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("no json\n")
    told = browser.news()
    assert told is not None
    assert [section["key"] for section in told["sections"]][:2] == ["troubles", "loss"]


def test_only_the_page_and_its_parts_are_served(folder: Path, browser: Browser) -> None:
    write_run(folder)
    status, headers, body = browser.get("/plotly.js")
    assert (status, "javascript" in headers["Content-Type"], len(body) > 10**6) == (200, True, True)
    for path in ("/metrics.jsonl", "/../run/summary.json", "/etc/passwd", "/state/"):
        assert browser.get(path)[0] == 404


def test_another_name_that_leads_here_is_refused(folder: Path, browser: Browser) -> None:
    write_run(folder)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example:80"):
        assert browser.get("/state", Host=host)[0] == 403
    assert browser.get("/", Host=browser.host.replace("127.0.0.1", "localhost"))[0] == 200


def test_a_port_that_is_taken_is_said(folder: Path, browser: Browser) -> None:
    port = int(browser.host.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=f"cannot listen on port {port} .* Leave out --port"):
        Dashboard(folder, port=port)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_address_and_ends_when_asked(folder: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "unisono.launch", "watch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as watch:
        assert watch.stdout is not None
        address = watch.stdout.readline().split()[0]
        assert b"Nothing has been logged" in Browser(address).get("/")[2]
        watch.send_signal(stop)
        assert watch.wait(timeout=20) == 0
