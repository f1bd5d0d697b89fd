"""The display of a running training on a terminal: a bar, and below it what there is to know.

::

    step 120/705 ━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  17%  left 0:12
    epoch 2/5  loss 0.1234  18,400 samples/s  waiting 4%  4 workers

``show`` only stores the reading; rich's refresh thread draws it. That thread never touches a tensor.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unisono.observe import formats
from unisono.observe.reading import Reading
from unisono.system.output import is_terminal

_REFRESH_PER_SECOND = 8
_MIN_BAR_WIDTH = 8
_GAP = "  "


class LiveView:
    """Draws readings in place on a terminal. *Local*.

    Args:
        console: An interactive console.
        workers: Workers that train now.
    """

    def __init__(self, console: Console, *, workers: int) -> None:
        self._console = console
        self._workers = workers
        self._picture = Picture(Reading(step=0, total_steps=None), workers)
        self._live: Live | None = None
        self._streams: tuple[TextIO, TextIO] | None = None

    def start(self, reading: Reading) -> None:
        """Draw the empty bar and begin to refresh."""
        self.show(reading)
        self._streams = (sys.stdout, sys.stderr)
        # While it is live, rich sends what the script prints through the console, above the bar. A stream that goes
        # to a file must keep going there.
        self._live = Live(
            get_renderable=lambda: self._picture,
            console=self._console,
            refresh_per_second=_REFRESH_PER_SECOND,
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=is_terminal(sys.stderr),
        )
        view = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _keep_child_off(view()))
        self._live.start(refresh=True)

    def show(self, reading: Reading) -> None:
        """Show this reading from the next refresh on."""
        self._picture = Picture(reading, self._workers)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Draw once more and give the terminal back; the last picture stays."""
        if self._live is not None:
            self._live.stop()
        self._live = self._streams = None

    def restore_streams(self) -> None:
        """Take the script's output past the display again."""
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams


def _keep_child_off(view: LiveView | None) -> None:
    """Give a forked child (a loader worker) plain streams.

    The refresh thread may have held the console's lock at the moment of the fork. In the child nobody would ever
    release it, and the first warning printed there would hang the loader.
    """
    if view is not None:
        view.restore_streams()


class Picture:
    """One reading, drawn for whatever width the terminal has now."""

    def __init__(self, reading: Reading, workers: int) -> None:
        self.reading = reading
        self.workers = workers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar_line(options.max_width)
        facts = [*self.reading.facts(), formats.count(self.workers, "worker")]
        for line in _filled(facts, options.max_width):
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _bar_line(self, width: int) -> Table:
        """Position, bar and time left, on one line; the bar takes what the others leave."""
        reading = self.reading
        before, after = reading.position(), _GAP.join([*self._percent(), *reading.left()])
        if len(before) + len(after) + 2 > width:
            after = _GAP.join(reading.left())
        line = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = [Text(before, style="bold", no_wrap=True, overflow="ellipsis")]
        bar_width = width - len(before) - 1 - (len(after) + 1 if after else 0)
        if bar_width >= _MIN_BAR_WIDTH:
            # An unknown end is a bar that moves to and fro.
            cells.append(ProgressBar(total=reading.total_steps, completed=reading.step, width=bar_width))
        if after:
            cells.append(Text(after, no_wrap=True, overflow="ellipsis"))
        line.add_row(*cells)
        return line

    def _percent(self) -> list[str]:
        if not self.reading.total_steps:
            return []
        return [formats.percent(self.reading.step / self.reading.total_steps)]


def _filled(words: list[str], width: int) -> Iterator[str]:
    """Join words with gaps into as few lines as fit the width; a word is never split."""
    line = ""
    for word in words:
        longer = f"{line}{_GAP}{word}" if line else word
        if line and len(longer) > width:
            yield line
            longer = word
        line = longer
    yield line
