"""Numbers as a person reads them: short, with units, the same in the progress display and in the summary."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A loss or metric, with an exponent where decimals say too little (``0.1234``, ``4012.50``, ``3.100e-05``)."""
    size = abs(value)
    if not math.isfinite(value):
        return str(float(value))
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.3e}"
    return f"{value:.4f}" if size < 100 else f"{value:.2f}"


def rate(per_second: float) -> str:
    """A number of things per second, without the unit (``18,400``; ``3.25`` where few)."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


def percent(share: float) -> str:
    """A share from 0 to 1 (``4%``); anything outside that range is a rounding error and is clipped."""
    return f"{min(max(share, 0.0), 1.0):.0%}"


def duration(seconds: float) -> str:
    """Whole seconds as a clock shows them (``0:12``, ``1:02:03``, ``2d 01:02:03``)."""
    if not math.isfinite(seconds):
        return str(float(seconds))
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def data_size(size_bytes: float) -> str:
    """Bytes in decimal units (``0 B``, ``38.9 kB``, ``1.2 GB``)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.95:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def count(number_of: int, singular: str) -> str:
    """A number of things in words (``1 worker``, ``4 workers``)."""
    return f"{number_of:,} {singular}" + ("" if number_of == 1 else "s")


def seconds(elapsed_s: float) -> str:
    """A time that was measured (``2.46 s``; from a minute on as a clock shows it)."""
    return f"{elapsed_s:.2f} s" if elapsed_s < 60 else duration(elapsed_s)
