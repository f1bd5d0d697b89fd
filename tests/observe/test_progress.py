from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from unisono.observe.live import LiveView
from unisono.observe.progress import Progress, ProgressDisplay, SilentProgress, standard_output
from unisono.observe.reading import Reading


class Clock:
    """Time that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Loss:
    """A loss that has to be fetched; remembers by whom."""

    def __init__(self, value: float = 0.1234) -> None:
        self.value = value
        self.threads: list[threading.Thread] = []

    def __call__(self) -> float:
        self.threads.append(threading.current_thread())
        return self.value


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Run:
    """A run of equal steps, seen through a Progress."""

    def __init__(self, console: Console, **settings: int | None) -> None:
        self.clock = Clock()
        self.file = console.file
        self.loss = Loss()
        values = {"total_steps": 20, "step": 0, "epochs": 2, "workers": 4, "batch_size": 100, **settings}
        self.progress = Progress(console=console, clock=self.clock, **values)  # type: ignore[arg-type]

    def step(self, step: int, *, epoch: int = 1, after_s: float = 0.01, speed: float = 500.0) -> None:
        self.clock.now += after_s
        self.progress.update(step=step, epoch=epoch, loss=self.loss, samples_per_second=speed, waiting_share=0.04)

    @property
    def lines(self) -> list[str]:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue().splitlines()

    @property
    def steps_shown(self) -> list[int]:
        return [int(found[1]) for line in self.lines if (found := re.match(r"step (\d+)", line))]


def plain(**settings: int | None) -> Run:
    return Run(Console(file=io.StringIO(), width=40), **settings)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def text_of(run: Run) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", "\n".join(run.lines))


def test_a_plain_line_says_everything_on_one_line() -> None:
    run = plain(total_steps=705, epochs=5)
    with run.progress:
        run.step(120, epoch=2, speed=18_400.0)
        assert run.lines == ["step 120/705  epoch 2/5  loss 0.1234  18,400 samples/s  waiting 4%  left 0:03"]


def test_plain_lines_are_the_first_step_the_ends_of_epochs_and_the_last_step() -> None:
    run = plain()
    with run.progress:
        for step in range(1, 21):
            run.step(step, epoch=1 + (step - 1) // 10)
    assert run.steps_shown == [1, 10, 20]


def test_plain_lines_within_an_epoch_are_seconds_apart() -> None:
    run = plain(total_steps=100, epochs=1)
    with run.progress:
        for step in range(1, 101):
            run.step(step, after_s=0.5)
    assert run.steps_shown == [1, *range(11, 100, 10), 100]


def test_many_short_epochs_do_not_flood_the_log() -> None:
    run = plain(total_steps=1000, epochs=1000)
    with run.progress:
        for step in range(1, 1001):
            run.step(step, epoch=step)
    assert len(run.lines) == 11
    assert run.steps_shown[-1] == 1000


def test_the_last_step_is_shown_at_once() -> None:
    run = plain(total_steps=3, epochs=None)
    with run.progress:
        for step in range(1, 4):
            run.step(step)
        assert run.steps_shown == [1, 3]


def test_a_resumed_run_counts_on() -> None:
    run = plain(step=14)
    with run.progress:
        for step in range(15, 21):
            run.step(step, epoch=2)
    assert run.steps_shown == [15, 20]


def test_with_an_unknown_end_there_are_no_totals_and_no_time_left() -> None:
    run = plain(total_steps=None, epochs=None)
    with run.progress:
        for step in range(1, 5):
            run.step(step, epoch=1 if step < 3 else 2, after_s=1.5)
    assert run.lines == [
        "step 1  epoch 1  loss 0.1234  500 samples/s  waiting 4%",
        "step 3  epoch 2  loss 0.1234  500 samples/s  waiting 4%",
        "step 4  epoch 2  loss 0.1234  500 samples/s  waiting 4%",
    ]


@pytest.mark.parametrize("speed", [0.0, math.nan, math.inf, 5e-324])
def test_a_speed_that_is_not_known_shows_no_time_left(speed: float) -> None:
    run = plain()
    with run.progress:
        run.step(1, speed=speed)
    assert "left" not in run.lines[0]


def test_a_single_worker_waits_for_nobody() -> None:
    run = plain(workers=1)
    with run.progress:
        run.step(1)
    assert "waiting" not in run.lines[0]


def test_a_loss_may_be_a_number_and_may_be_nan() -> None:
    run = plain()
    with run.progress:
        run.progress.update(step=1, epoch=1, loss=math.nan, samples_per_second=1.0, waiting_share=0.0)
    assert "loss nan" in run.lines[0]


def test_the_loss_is_fetched_only_for_what_is_drawn() -> None:
    run = plain()
    with run.progress:
        for step in range(1, 10):
            run.step(step)
        assert len(run.loss.threads) == 1
    assert len(run.loss.threads) == 2


def test_a_run_stopped_early_shows_its_last_step_once() -> None:
    run = plain()
    with run.progress:
        for step in range(1, 6):
            run.step(step)
        run.progress.finish()
        run.progress.finish()
        run.step(6, after_s=60)
    assert run.steps_shown == [1, 5]


def test_after_an_error_the_loss_is_not_fetched_again() -> None:
    run = plain()
    with pytest.raises(ValueError, match="broken"), run.progress:
        run.step(1)
        run.step(2)
        raise ValueError("broken")
    assert len(run.loss.threads) == 1


def test_a_plain_note_is_printed_as_it_is() -> None:
    run = plain()
    with run.progress:
        run.progress.note("epoch 1: accuracy [bold]0.97[/] :smile: " + "x" * 100)
    assert run.lines == ["epoch 1: accuracy [bold]0.97[/] :smile: " + "x" * 100]


def test_a_run_without_steps_shows_nothing() -> None:
    run = plain()
    with run.progress:
        pass
    assert run.lines == []


def test_the_live_display_ends_with_the_last_step(terminal: Console) -> None:
    run = Run(terminal)
    with run.progress:
        for step in range(1, 21):
            run.step(step, epoch=2)
    last = text_of(run).rstrip().splitlines()[-2:]
    assert re.fullmatch(r"step 20/20 ━+ 100% left 0:00 *", last[0])
    assert last[1].strip() == "epoch 2/2  loss 0.1234  500 samples/s  waiting 4%  4 workers"


def test_the_live_display_fetches_the_loss_at_most_ten_times_a_second(terminal: Console) -> None:
    run = Run(terminal, total_steps=1001, epochs=None)
    with run.progress:
        for step in range(1, 1001):
            run.step(step)
        assert 90 <= len(run.loss.threads) <= 101


def test_the_live_display_fetches_the_loss_on_the_training_thread_only() -> None:
    drawn_by_another_thread = threading.Event()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            if "loss 0.1234" in text and threading.current_thread() is not threading.main_thread():
                drawn_by_another_thread.set()
            return super().write(text)

    run = Run(Console(file=Watched(), force_terminal=True, width=80, color_system=None))
    with run.progress:
        run.step(1)
        assert drawn_by_another_thread.wait(10)
    assert run.loss.threads == [threading.main_thread()]


def test_a_live_note_is_printed_above_the_bar(terminal: Console) -> None:
    run = Run(terminal)
    with run.progress:
        run.step(1)
        run.progress.note("saved [1] :smile:")
    text = text_of(run)
    assert "saved [1] :smile:" in text
    assert text.rindex("step 1/20") > text.index("saved")


def test_the_cursor_comes_back_after_an_error(terminal: Console) -> None:
    run = Run(terminal)
    with pytest.raises(ValueError, match="broken"), run.progress:
        run.step(1)
        raise ValueError("broken")
    output = "\n".join(run.lines)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_what_the_script_prints_to_a_file_stays_out_of_the_display(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    run = Run(terminal)
    with run.progress:
        print("result 42")
    assert stream.getvalue() == "result 42\n"


def test_what_the_script_prints_to_the_terminal_goes_above_the_bar(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    run = Run(terminal)
    with run.progress:
        print("result 42")
    assert "result 42" in text_of(run)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_loader_worker_prints_past_the_display(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    view = LiveView(terminal, workers=1)
    view.begin(Reading(step=0, total_steps=1))
    try:
        assert sys.stdout is not stream
        child = os.fork()
        if child == 0:
            os._exit(0 if sys.stdout is stream else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sys.stdout is not stream
    finally:
        view.stop()
    assert sys.stdout is stream


def test_forced_colour_does_not_make_a_log_file_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not standard_output().is_interactive
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert standard_output().is_interactive


def test_silent_progress_shows_nothing_and_fetches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    loss = Loss()
    silent: ProgressDisplay = SilentProgress()
    with silent:
        silent.update(step=1, epoch=1, loss=loss, samples_per_second=1.0, waiting_share=0.0)
        silent.note("hello")
        silent.finish()
    assert loss.threads == []
    assert capsys.readouterr().out == ""


def test_an_update_costs_less_than_20_microseconds(terminal: Console) -> None:
    for console in (Console(file=io.StringIO()), terminal):
        progress = Progress(total_steps=10**9, step=0, epochs=None, workers=4, batch_size=64, console=console)
        best = math.inf
        with progress:
            for repeat in range(5):
                began = time.perf_counter()
                for step in range(2000):
                    progress.update(step=repeat * 2000 + step, epoch=1, loss=0.5, samples_per_second=1e5, waiting_share=0.0)
                best = min(best, (time.perf_counter() - began) / 2000)
        assert best < 20e-6


def test_rich_is_imported_only_when_something_is_shown() -> None:
    code = (
        "import sys, unisono.observe.progress, unisono.observe.summary, unisono.observe.metrics;"
        "sys.exit(any(name.split('.')[0] == 'rich' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
