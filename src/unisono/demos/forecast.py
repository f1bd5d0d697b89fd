"""Forecasts with intervals: how late will this flight arrive? All 336,776 flights that left New York in 2013, or your CSV file.

A forecast is made at departure, from the departure delay and the flight plan: the median and an interval that holds 80 % of the
outcomes. The net starts as a linear regression and learns all three from the quantile loss. It is tested on whole days that it
has not seen, every fifth one; on your CSV file on the last fifth of the rows.

    unisono demo forecast --workers 2
    unisono demo forecast --data sales.csv --target units --run-dir runs/sales    # rows in order of time, a header row
    unisono demo forecast --predict new.csv                                       # a forecast for each row
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono.demos import _application as application
from unisono.demos._data import obtain
from unisono.demos._flights import FLIGHTS, flight_columns, is_flights
from unisono.demos._tables import Features, Integers, Table, TableNet, for_sklearn, read_csv
from unisono.report import charts
from unisono.report.attachments import attach

MICROBATCHES = 4
QUANTILES = (0.1, 0.5, 0.9)


class ForecastNet(TableNet):
    """Numbers ``[N, width]`` and codes ``[N, C]`` to three quantiles ``[N, 3]`` in ascending order, in units of ``scale``."""

    def __init__(self, width: int, sizes: list[int]) -> None:
        super().__init__(width, sizes)
        self.linear = nn.Linear(width, 1)
        self.layers = nn.Sequential(nn.Linear(self.inputs_width, 192), nn.SiLU(), nn.Dropout(0.05), nn.Linear(192, 96), nn.SiLU())
        self.out = nn.Linear(96, len(QUANTILES))

    @torch.no_grad()
    def start_linear(self, numbers: Tensor, target: Tensor) -> None:
        """*local*. Starts from least squares, so that the layers need to learn only what that misses."""
        columns = torch.cat([numbers, torch.ones(len(numbers), 1)], dim=1).double().numpy()
        solution = np.linalg.lstsq(columns, target.double().numpy(), rcond=1e-6)[0]
        # Rounded: the memory alignment of the matrix may change the last bits.
        start = torch.from_numpy(solution.round(4)).float()
        self.linear.weight.copy_(start[None, :-1])
        self.linear.bias.copy_(start[-1:])
        nn.init.normal_(self.out.weight, std=0.01)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        below, middle, above = self.out(self.layers(self.inputs(numbers, codes, limit=4))).unbind(1)
        median = middle + self.linear(numbers).squeeze(1)
        return torch.stack([median - F.softplus(below), median, median + F.softplus(above)], dim=1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    """The quantile ("pinball") loss of the three forecasts (Koenker and Bassett, 1978)."""
    numbers, codes, target = batch
    error = target[:, None] - model(numbers, codes)
    q = torch.tensor(QUANTILES)
    return torch.maximum(q * error, (q - 1) * error).sum(), len(target)


def absolute_error(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], *, scale: float) -> tuple[Tensor, int]:
    numbers, codes, target = batch
    return (model(numbers, codes)[:, 1] - target).abs().sum() * scale, len(target)


def coverage(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    numbers, codes, target = batch
    low, _, high = model(numbers, codes).unbind(1)
    return ((low <= target) & (target <= high)).sum(), len(target)


def split(table: Table, days: Integers, spread: bool) -> tuple[Integers, Integers]:
    """Rows to train on and rows to test on: every fifth day, or the last fifth in time.

    Raises:
        DataError: There are too few rows.
    """
    in_test = days % 5 == 4
    if not spread:
        in_test[:] = False
        in_test[np.argsort(days, kind="stable")[len(table) - len(table) // 5 :]] = True
    if not 0 < in_test.sum() < len(table):
        raise unisono.DataError(f"{table.file} has {len(table)} usable rows: too few to keep a fifth of them for the test")
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def baselines(train: TensorDataset, test: TensorDataset, scale: float) -> dict[str, float]:
    """Mean absolute errors of others that learn from the same columns."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    ((train_x, train_y), (test_x, test_y)), words, one_hot = for_sklearn(train, test)
    train_y, test_y = train_y * scale, test_y * scale
    boosting = HistGradientBoostingRegressor(loss="absolute_error", max_iter=200, categorical_features=words, random_state=0)
    forecasts = {
        "gradient boosting (HistGradientBoosting)": boosting.fit(train_x, train_y).predict(test_x),
        "linear regression": make_pipeline(one_hot, Ridge(1.0)).fit(train_x, train_y).predict(test_x),
        "always the median": np.full_like(test_y, np.median(train_y)),
    }
    return {name: float(np.abs(forecast - test_y).mean()) for name, forecast in forecasts.items()}


def predict(run_dir: str, file: str) -> None:
    """Prints a CSV: a line with low end, median and high end for each row of the file."""
    settings = application.trained(run_dir, "forecast")
    features = Features.from_json(settings["features"])
    model = ForecastNet(features.width, features.sizes)
    application.load_weights(model, run_dir)
    table = read_csv(Path(file))
    if settings["flights"]:
        table, _ = flight_columns(Table(table.file, {k: v for k, v in table.columns.items() if k != "arr_delay"}))
    with torch.no_grad():
        quantiles = model(*features.encode(table)) * settings["scale"] + settings["middle"]
    print("low,median,high")
    for row in quantiles.tolist():
        print(",".join(f"{value:.2f}" for value in row))


def main() -> None:
    parser = application.options(
        "forecast",
        "Forecast a column of a table, with an 80 % interval.",
        epochs=12,
        batch_size=2048,
        data="a CSV file, its rows in order of time (else: --test spread); default: the flights",
        predict="forecast each row of CSV file X",
    )
    parser.add_argument("--target", default="arr_delay", help="the column to forecast; default: %(default)s")
    parser.add_argument("--test", choices=("spread", "last"), help="test on every fifth day or row, or on the last fifth of rows")
    arguments = parser.parse_args()
    world = unisono.World.from_environment().at_most(MICROBATCHES)
    if arguments.predict is not None:
        return predict(arguments.run_dir, arguments.predict) if world.is_main else None

    table = read_csv(obtain(FLIGHTS, arguments.data, world))
    flights = is_flights(table) and arguments.target == "arr_delay"
    table, days = flight_columns(table) if flights else (table, np.arange(len(table)))
    target = table.numbers(arguments.target)
    train_rows, test_rows = split(table, days, spread=flights if arguments.test is None else arguments.test == "spread")
    if np.ptp(target[train_rows]) == 0:
        raise unisono.DataError(f"{table.file}: column {arguments.target!r} is {target[0]:g} in all rows to train on")
    features = Features.fit(table.take(train_rows), leave_out=[arguments.target])
    middle, scale = float(np.median(target[train_rows])), float(np.std(target[train_rows]))
    train, test = features.datasets(table, (target - middle) / scale, train_rows, test_rows)

    torch.manual_seed(arguments.seed)
    model = ForecastNet(features.width, features.sizes)
    model.start_linear(train.tensors[0], train.tensors[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    error = functools.partial(absolute_error, scale=scale)
    metrics: dict[str, Any] = {"mean absolute error": error, "share in the interval": coverage}
    shown = application.Evaluation(test, metrics, batch_size=4096, every=2, epochs=arguments.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    settings = application.settings(arguments, MICROBATCHES)
    trainer = unisono.Trainer(model, optimizer, loss, scheduler=schedule, max_grad_norm=1.0, callbacks=[shown], **settings)
    trainer.fit(train, epochs=arguments.epochs)
    mean_error, covered = shown.measure(trainer).values()
    if not trainer.world.is_main:
        return
    kept = {"demo": "forecast", "features": features.to_json(), "scale": scale, "middle": middle, "flights": flights}
    application.keep_settings(arguments.run_dir, kept)
    values = {"this run": mean_error, **baselines(train, test, scale)}
    title = f"Mean absolute error of {arguments.target}, {len(test):,} rows that were not trained on"
    application.compare(arguments.run_dir, title, "mean absolute error", values, higher_is_better=False)
    print(f"the 80 % interval holds {covered:.1%}")

    some = slice(0, 60)
    with torch.no_grad():
        low, median, high = (model(*test[some][:2]) * scale + middle).T.tolist()
    observed = target[test_rows][some].tolist()
    picture = charts.forecast(list(range(len(low))), median, low, high, observed, coverage=0.8)
    finding = f"the interval holds {covered:.1%} of all {len(test):,}"
    attach(arguments.run_dir, "The first rows of the test", picture, finding=finding, wide=True)


if __name__ == "__main__":
    main()
