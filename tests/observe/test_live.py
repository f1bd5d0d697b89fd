from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from unisono.observe.live import LiveView
from unisono.observe.reading import Reading


def picture(width: int, **changes: object) -> list[str]:
    values = {
        "step": 120, "total_steps": 705, "epoch": 2, "epochs": 5, "loss": 0.1234, "samples_per_second": 18_400.0,
        "waiting_share": 0.04, "seconds_left": 12.0, **changes,
    }  # fmt: skip
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    view = LiveView(console, workers=4)
    view.show(Reading(**values))  # type: ignore[arg-type]
    console.print(view.get_renderable())
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_picture_at_80_columns_is_two_lines() -> None:
    bar, facts = picture(80)
    assert re.fullmatch(r"step 120/705 ━+╸? +17% left 0:12", bar)
    assert len(bar) == 80
    assert facts == "epoch 2/5  loss 0.1234  18,400 samples/s  waiting 4%  4 workers"


def test_the_picture_at_40_columns_breaks_between_facts() -> None:
    bar, *facts = picture(40)
    assert re.fullmatch(r"step 120/705 ━+╸? +17% left 0:12", bar)
    assert facts == ["epoch 2/5  loss 0.1234  18,400 samples/s", "waiting 4%  4 workers"]


@pytest.mark.parametrize("width", [1, 10, 24, 33, 40, 80, 200])
@pytest.mark.parametrize("total_steps", [None, 0, 100, 10**9])
def test_the_picture_never_exceeds_the_width(width: int, total_steps: int | None) -> None:
    assert all(len(line) <= width for line in picture(width, total_steps=total_steps))


@pytest.mark.parametrize("width", range(20, 81))
def test_the_picture_never_cuts_a_fact(width: int) -> None:
    facts = picture(width)[1:]
    assert "  ".join(facts) == "epoch 2/5  loss 0.1234  18,400 samples/s  waiting 4%  4 workers"
