"""The display of a running training on a terminal: a bar, and below it what is known of the run.

::

    step 120/705 ━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  17% left 0:12
    epoch 2/5  loss 0.1234  18,400 samples/s  waiting 4%  4 workers
"""

from __future__ import annotations

import os
import sys
import textwrap
import weakref
from collections.abc import Iterable
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from unisono.observe import formats
from unisono.observe.reading import Reading
from unisono.system.output import is_terminal

_MIN_BAR_WIDTH = 8


class LiveView(progress.Progress):
    """Draws readings in place on a terminal. *Local*.

    ``show`` only stores the reading; rich's refresh thread draws it. That thread never touches a tensor.

    Args:
        console: An interactive console.
        workers: Workers that train now.
    """

    def __init__(self, console: Console, *, workers: int) -> None:
        # While it is live, rich sends what the script prints through the console, above the bar. A stream that goes to a
        # file must keep going there.
        out, err = is_terminal(sys.stdout), is_terminal(sys.stderr)
        super().__init__(console=console, refresh_per_second=8, expand=True, redirect_stdout=out, redirect_stderr=err)
        self._streams = (sys.stdout, sys.stderr)
        self._workers = formats.count(workers, "worker")
        self._position = progress.TextColumn("[bold]{task.fields[position]}")
        self._bar = (progress.BarColumn(bar_width=None), progress.TextColumn("{task.fields[percent]}"))
        self._left = progress.TextColumn("{task.fields[left]}")
        self._task = self.add_task("", total=None, position="", percent="", left="", facts=[])

    def begin(self, reading: Reading) -> None:
        """Draw the empty bar and begin to refresh."""
        self.show(reading)
        view = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _restore_streams(view()))
        self.start()

    def show(self, reading: Reading) -> None:
        """Show this reading from the next refresh on."""
        percent = formats.percent(reading.step / reading.total_steps) if reading.total_steps else ""
        position, left = reading.position(), " ".join(reading.left())
        fields: dict[str, Any] = {
            "position": position,
            "percent": f"{percent:>4}",
            "left": left,
            "facts": [*reading.facts(), self._workers],
        }
        self.update(self._task, total=reading.total_steps, completed=reading.step, **fields)  # no total: the bar moves to and fro

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """A line with the bar, where the terminal is wide enough for one, and the facts on as many lines as they need."""
        for task in self.tasks:  # there is none yet when rich asks for the first time
            room = self.console.width - sum(len(task.fields[name]) + 1 for name in ("position", "percent", "left"))
            self.columns = (self._position, *(self._bar if room >= _MIN_BAR_WIDTH else ()), self._left)
            yield self.make_tasks_table([task])
            yield Text(_filled(task.fields["facts"], self.console.width), style="dim", no_wrap=True, overflow="ellipsis")

    def restore_streams(self) -> None:
        """Let the script's output bypass the display again."""
        sys.stdout, sys.stderr = self._streams


def _filled(facts: list[str], width: int) -> str:
    """Facts on as few lines as fit the width; none is split at its spaces."""
    whole = "  ".join(fact.replace(" ", "\xa0") for fact in facts)
    return "\n".join(textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)).replace("\xa0", " ")


def _restore_streams(view: LiveView | None) -> None:
    """Give a forked child (a loader worker) plain streams.

    The refresh thread may have held the console's lock at the moment of the fork. In the child no thread would ever
    release it, and the first warning printed there would hang the loader.
    """
    if view is not None and view.live.is_started:
        view.restore_streams()
