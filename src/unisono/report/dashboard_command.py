"""What ``unisono watch`` does. *Local.*"""

from __future__ import annotations

import os
import time
import webbrowser
from collections.abc import Callable

from unisono.report.dashboard_server import Dashboard
from unisono.system.signals import StopRequest


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
