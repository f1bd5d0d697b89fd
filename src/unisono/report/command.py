"""What ``unisono report`` and ``unisono watch`` do. *Local.*"""

from __future__ import annotations

import os
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from unisono.checkpoint.store import Store
from unisono.errors import ConfigurationError
from unisono.report.comparison import comparison_page
from unisono.report.page import report_html
from unisono.report.run_data import RunReader, run_names
from unisono.report.run_page import run_page
from unisono.report.server import Dashboard
from unisono.system.signals import StopRequest

REPORT_FILE = "report.html"
"""Name of a run's report in its directory."""
COMPARISON_FILE = "comparison.html"
"""Name of the page that compares runs, in the current folder."""


def write_report(run_dirs: Sequence[str], *, output: str | os.PathLike[str] | None = None) -> str:
    """Write a report of one run, or one that compares several.

    Args:
        run_dirs: Run directories: paths or fsspec addresses.
        output: The file to write; by default ``report.html`` in the run directory, ``comparison.html`` in the current folder.

    Returns:
        Where it was written.

    Raises:
        ConfigurationError: A directory does not exist or holds nothing of a run, or Plotly is not installed.
        CheckpointError: The file cannot be written.
    """
    names = run_names(list(run_dirs)) if len(run_dirs) > 1 else [None]
    readers = [RunReader(url, name=name) for url, name in zip(run_dirs, names, strict=True)]
    for reader in readers:
        check_is_run(reader.store)
    runs = [reader.read() for reader in readers]
    html = report_html(run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    if output is None and len(runs) == 1:
        readers[0].store.write(REPORT_FILE, html.encode())
        return readers[0].store.where(REPORT_FILE)
    target = Path(output if output is not None else COMPARISON_FILE).expanduser().absolute()
    Store(target.parent).write(target.name, html.encode())
    return str(target if output is None else output)


def check_is_run(store: Store) -> None:
    """ConfigurationError unless something of a run is in it."""
    if store.path is not None and not store.path.is_dir():
        what = "is not a folder" if store.path.exists() else "does not exist"
        raise ConfigurationError(f"{store.url} {what}. Give the run_dir of a Trainer.")
    if not any(store.exists(name) for name in ("metrics.jsonl", "manifest.json", "summary.json", "report.json")):
        raise ConfigurationError(
            f"{store.url} holds no files of a run (no metrics.jsonl, manifest.json or summary.json). Give the run_dir of a "
            "Trainer; to wait for a run that is yet to begin, use unisono watch."
        )


def show(path: str) -> bool:
    """Open a report in the user's browser; False if there is none, or the file is on another machine."""
    if "://" in path:
        return False
    return webbrowser.open(Path(path).absolute().as_uri())


def watch(run_dir: str | os.PathLike[str], *, port: int, open_page: bool, say: Callable[[str], None]) -> None:
    """Serve the page of a run until Ctrl-C or SIGTERM.

    Args:
        run_dir: The run directory, a path or an fsspec address; it may not be there yet.
        port: Where to listen; 0: any free port.
        open_page: Whether to open the user's browser.
        say: Prints a line.

    Raises:
        ConfigurationError: The port is taken, or Plotly is not installed.
    """
    with StopRequest() as stop, Dashboard(run_dir, port=port) as dashboard:
        say(f"{dashboard.address}  shows {os.fspath(run_dir)}; Ctrl-C ends it")
        if open_page:
            webbrowser.open(dashboard.address)
        while not stop.requested:
            time.sleep(0.2)
