"""Card transactions with known frauds: simulated, and the features that a fraud detection system computes.

The method is that of the "Reproducible Machine Learning for Credit Card Fraud Detection - Practical Handbook" (Le Borgne,
Siblini, Lebichot, Bontempi; Université Libre de Bruxelles, 2022), written anew: customers and terminals on a map, customers who
spend at terminals near them, and three kinds of fraud.
"""

from __future__ import annotations

import numpy as np

from unisono.demos._tables import Floats, Integers, Table, Words

DAY_S = 86_400
_RADIUS = 5.0
LABEL_DELAY_DAYS = 7.0
"""Until a customer notices a fraud: a terminal's risk may be computed from older payments only."""


def simulate(customers: int, terminals: int, days: int, seed: int) -> Table:
    """*local*. Payments in order of time: ``time`` in seconds, ``customer``, ``terminal``, ``amount``, ``fraud``, ``scenario``.

    Scenarios: 1, every amount above 220; 2, two terminals a day are taken over and cheat for 28 days; 3, three customers a day
    lose their card's data, and for 14 days a third of their transactions is five times as high, and fraud.
    """
    random = np.random.default_rng(seed)
    homes, places = random.uniform(0, 100, (customers, 2)), random.uniform(0, 100, (terminals, 2))
    typical, frequency = random.uniform(5, 100, customers), random.uniform(0, 4, customers)
    counts = random.poisson(frequency[:, None], (customers, days))
    customer = np.repeat(np.arange(customers), counts.sum(1))
    day = np.repeat(np.tile(np.arange(days), customers), counts.ravel())
    second = random.normal(DAY_S / 2, 20_000, len(day))
    amount = random.normal(typical[customer], typical[customer] / 2)
    amount = np.where(amount < 0, random.uniform(0, 2 * typical[customer]), amount).round(2)
    terminal = _nearby(homes, places, customer, random)
    keep = (second > 0) & (second < DAY_S) & (terminal >= 0)
    time = day * DAY_S + second.astype(np.int64)
    order = np.flatnonzero(keep)[np.argsort(time[keep], kind="stable")]
    time, day, customer, terminal = time[order], day[order], customer[order], terminal[order]
    amount = amount[order]

    scenario = np.where(amount > 220, 1, 0)
    by_terminal, by_customer = _rows_of(terminal, terminals), _rows_of(customer, customers)
    for today in range(days):
        for cheat in random.choice(terminals, 2, replace=False):
            rows = by_terminal[cheat]
            scenario[rows[(day[rows] >= today) & (day[rows] < today + 28)]] = 2
        for victim in random.choice(customers, 3, replace=False):
            rows = by_customer[victim]
            rows = rows[(day[rows] >= today) & (day[rows] < today + 14)]
            rows = random.choice(rows, len(rows) // 3, replace=False)
            amount[rows] = (amount[rows] * 5).round(2)
            scenario[rows] = 3
    columns = {"time": time, "customer": customer, "terminal": terminal, "amount": amount, "fraud": scenario > 0}
    columns["scenario"] = scenario
    return Table("simulated transactions", {name: values.astype(np.float64) for name, values in columns.items()})


def hours(time: Floats) -> Words:
    """*local*. The hour of the day of times in seconds."""
    return Words((time % DAY_S // 3600).astype(np.int64), [str(number) for number in range(24)])


def _nearby(homes: Floats, places: Floats, customer: Integers, random: np.random.Generator) -> Integers:
    """For each transaction a terminal within the radius of its customer's home; -1 where there is none."""
    near = [np.flatnonzero(((places - home) ** 2).sum(1) < _RADIUS**2) for home in homes]
    sizes = np.array([len(found) for found in near])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    flat = np.concatenate([*near, [-1]])
    pick = (random.uniform(size=len(customer)) * sizes[customer]).astype(np.int64)
    return np.where(sizes[customer] > 0, flat[np.minimum(starts[customer] + pick, len(flat) - 1)], -1)


def _rows_of(ids: Integers, count: int) -> list[Integers]:
    order = np.argsort(ids, kind="stable")
    return np.split(order, np.cumsum(np.bincount(ids, minlength=count))[:-1])


def with_history(table: Table, label: str = "fraud") -> Table:
    """*local*. The columns that a model learns from, and the label: what is known of each transaction when it happens.

    Over the last 1, 7 and 30 days: how often its customer paid and how much on average; how often its terminal was used and
    which share of that was fraud, as far as it is known a week later. Without labels no fraud is known. Rows keep their places.
    """
    time, amount = table.numbers("time"), table.numbers("amount")
    fraud = table.numbers(label) if label in table.columns else np.zeros(len(table))
    customer, terminal = (table.numbers(name).astype(np.int64) for name in ("customer", "terminal"))
    columns: dict[str, Floats | Words] = {
        "amount": amount,
        "hour": hours(time),
        "weekday": Words((time // DAY_S % 7).astype(np.int64), [str(number) for number in range(7)]),
    }
    for days in (1, 7, 30):
        count, spent = _window(customer, time, amount, 0.0, days)
        columns[f"customer's payments, {days} d"] = count
        columns[f"customer's mean amount, {days} d"] = spent / np.maximum(count, 1)
        count, frauds = _window(terminal, time, fraud, LABEL_DELAY_DAYS, days)
        columns[f"terminal's payments, {days} d"] = count
        columns[f"terminal's risk, {days} d"] = frauds / np.maximum(count, 1)
    columns["amount over customer's mean"] = amount / np.maximum(columns["customer's mean amount, 30 d"], 1.0)  # type: ignore[arg-type]
    columns[label] = fraud
    return Table(table.file, columns)


def _window(ids: Integers, time: Floats, values: Floats, delay_days: float, days: float) -> tuple[Floats, Floats]:
    """For each row: how many rows of the same id lie in the ``days`` before ``delay_days`` ago (itself included without a
    delay), and the sum of their values."""
    order = np.lexsort((time, ids))
    span = time.max() + (delay_days + days + 1) * DAY_S
    key = ids[order] * span + time[order]
    until = key - delay_days * DAY_S
    floor = ids[order] * span  # with a delay, the window must not reach rows of other ids
    last = np.searchsorted(key, np.maximum(until, floor), side="right" if delay_days == 0 else "left")
    first = np.searchsorted(key, np.maximum(until - days * DAY_S, floor), side="left")
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    counts, totals = np.empty(len(ids)), np.empty(len(ids))
    counts[order] = last - first
    totals[order] = sums[last] - sums[first]
    return counts, totals
