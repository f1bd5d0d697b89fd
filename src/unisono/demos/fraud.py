"""Fraud detection: which card payments are frauds? Simulated payments, the well-known `creditcard.csv`, or your CSV file.

About one payment in a hundred is a fraud. The net is trained on the past and tested on the last fifth of the time. There is a
week between the two, because frauds become known only after a week.

    unisono demo fraud --workers 2
    unisono demo fraud --data creditcard.csv --run-dir runs/creditcard           # label column "Class"
    unisono demo fraud --data claims.csv --label fraudulent --run-dir runs/claims  # rows in order of time, a header row
    unisono demo fraud --predict new.csv                                           # a score for each row
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono.demos import _application as application
from unisono.demos._data import existing
from unisono.demos._tables import Features, Floats, Integers, Table, TableNet, for_sklearn, read_csv
from unisono.demos._transactions import DAY_S, LABEL_DELAY_DAYS, hours, simulate, with_history
from unisono.report import charts
from unisono.report.attachments import attach

MICROBATCHES = 4
TEST_SHARE = 0.2
ALERTS = 0.01
FRAUD_WEIGHT = 4.0
CUSTOMERS, TERMINALS, DAYS = 3600, 7200, 90
PAYMENTS = ("time", "customer", "terminal", "amount")


class PaymentNet(TableNet):
    """Numbers ``[N, width]`` and codes ``[N, C]`` to the logit of fraud ``[N]``."""

    def __init__(self, width: int, sizes: list[int]) -> None:
        super().__init__(width, sizes)
        self.layers = nn.Sequential(
            nn.Linear(self.inputs_width, 128),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 64),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 1),
        )

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        logits: Tensor = self.layers(self.inputs(numbers, codes, limit=5)).squeeze(1)
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    """Frauds are rare: each weighs as much as ``FRAUD_WEIGHT`` honest payments."""
    numbers, codes, label = batch
    weight = torch.tensor(FRAUD_WEIGHT)
    return F.binary_cross_entropy_with_logits(model(numbers, codes), label, pos_weight=weight, reduction="sum"), len(label)


def prepare(table: Table, label: str) -> tuple[Table, Floats, float]:
    """Columns to learn from, when each row was (for the split), and how long labels take to be known, in the same unit."""
    if all(name in table.columns for name in PAYMENTS):
        return with_history(table, label), table.numbers("time") / DAY_S, LABEL_DELAY_DAYS
    if "Time" in table.columns and "V1" in table.columns:  # creditcard.csv: seconds since its first row, of which the hour recurs
        time = table.numbers("Time")
        return Table(table.file, {**table.columns, "Time": hours(time)}), time, 0.0
    return table, np.arange(len(table), dtype=np.float64), 0.0


def split(table: Table, label: str, when: Floats, delay: float) -> tuple[Integers, Integers]:
    """Rows to train on and rows to test on: the last part in time.

    Raises:
        DataError: A label is neither 0 nor 1, one part has labels of one class only, or there is too little to train on.
    """
    labels = table.numbers(label)
    if not np.isin(labels, (0, 1)).all():
        row = int(np.argmax(~np.isin(labels, (0, 1))))
        raise table.error(row, label, f"{labels[row]:g} is not a label. Write 0 or 1.")
    test_from = np.quantile(when, 1 - TEST_SHARE)
    train, test = np.flatnonzero(when < test_from - delay), np.flatnonzero(when >= test_from)
    for part, rows in (("train on (the first in time)", train), ("test on (the last in time)", test)):
        if len(np.unique(labels[rows])) < 2:
            found = f"all {len(rows):,} have {labels[rows[0]]:g}" if len(rows) else "there are none"
            raise unisono.DataError(
                f"{table.file}: of the rows to {part} {found} in column {label!r}. Both parts need rows with 0 and rows with 1."
            )
    fewest = min(np.bincount(labels[train].astype(np.int64)))
    if len(train) < 20 or fewest < 2:
        raise unisono.DataError(
            f"{table.file}: {len(train):,} rows to train on, with {fewest} of the rarer label, are too few: give it 20 or more, "
            "with 2 or more of each label"
        )
    return train, test


def scores(model: nn.Module, numbers: Tensor, codes: Tensor) -> Floats:
    """Probabilities of fraud, too high where ``FRAUD_WEIGHT`` is above 1: they put payments in order."""
    with torch.no_grad():
        model.eval()
        return torch.sigmoid(model(numbers, codes)).double().numpy()


def baselines(train: TensorDataset, test: TensorDataset) -> dict[str, Floats]:
    """Scores of others that learn from the same columns."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    ((train_x, train_y), (test_x, _)), words, one_hot = for_sklearn(train, test)
    boosting = HistGradientBoostingClassifier(categorical_features=words, early_stopping=True, random_state=0)
    logistic = make_pipeline(one_hot, LogisticRegression(class_weight="balanced", max_iter=300))
    models = {"gradient boosting (HistGradientBoosting)": boosting, "logistic regression": logistic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence: more iterations do not help the second
        return {name: model.fit(train_x, train_y).predict_proba(test_x)[:, 1] for name, model in models.items()}


def report(run_dir: str, labels: Floats, found: Mapping[str, Floats]) -> None:
    """Average precision, recall among the alerts and the precision-recall curve of all scores."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    alerts = max(1, int(len(labels) * ALERTS))
    precision, recall, lines = {}, {}, {}
    for name, score in found.items():
        precision[name] = float(average_precision_score(labels, score))
        recall[name] = float(labels[np.argsort(-score, kind="stable")[:alerts]].sum() / labels.sum())
        p, r, _ = precision_recall_curve(labels, score)
        thin = np.unique(np.linspace(0, len(p) - 1, 400).astype(int))
        lines[name] = (r[thin], p[thin])
    rows = f"{len(labels):,} payments after those trained on, {labels.mean():.2%} of them frauds"
    application.compare(run_dir, f"Average precision, {rows}", "average precision", precision, higher_is_better=True)
    title = f"Frauds among the {ALERTS:.0%} of payments with the highest scores"
    application.compare(run_dir, title, "share of all frauds", recall, higher_is_better=True)
    attach(run_dir, "Precision and recall", charts.curves("recall", "precision", lines))


def predict(run_dir: str, file: str) -> None:
    """Prints a score for each row of a CSV file."""
    settings = application.trained(run_dir, "fraud")
    features = Features.from_json(settings["features"])
    model = PaymentNet(features.width, features.sizes)
    application.load_weights(model, run_dir)
    table, _, _ = prepare(read_csv(Path(file)), settings["label"])
    print("score")
    for score in scores(model, *features.encode(table)):
        print(f"{score:.6f}")


def main() -> None:
    parser = application.options(
        "fraud",
        "Find frauds among payments, or rare rows of any table.",
        epochs=10,
        batch_size=2048,
        data=f"a CSV file; columns {', '.join(PAYMENTS)} get their history computed; default: simulated payments",
        predict="score each row of CSV file X",
    )
    parser.add_argument("--label", help='the column of labels, 0 or 1; default: "Class" if there is one, else "fraud"')
    arguments = parser.parse_args()
    world = unisono.World.from_environment().at_most(MICROBATCHES)
    if arguments.predict is not None:
        return predict(arguments.run_dir, arguments.predict) if world.is_main else None

    given = arguments.data
    table = simulate(CUSTOMERS, TERMINALS, DAYS, seed=0) if given is None else read_csv(existing(given))
    label = arguments.label or ("Class" if "Class" in table.columns else "fraud")
    table.numbers(label)  # required here; history takes missing labels for unknown ones
    table, when, delay = prepare(table, label)
    train_rows, test_rows = split(table, label, when, delay)
    features = Features.fit(table.take(train_rows), leave_out=[label])
    labels = table.numbers(label)
    train, test = features.datasets(table, labels, train_rows, test_rows)

    torch.manual_seed(arguments.seed)
    model = PaymentNet(features.width, features.sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    shown = application.Evaluation(test, {"test loss": loss}, batch_size=4096, every=1, epochs=arguments.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    settings = application.settings(arguments, MICROBATCHES)
    trainer = unisono.Trainer(model, optimizer, loss, scheduler=schedule, max_grad_norm=1.0, callbacks=[shown], **settings)
    trainer.fit(train, epochs=arguments.epochs)
    shown.measure(trainer)
    if trainer.world.is_main:
        application.keep_settings(arguments.run_dir, {"demo": "fraud", "features": features.to_json(), "label": label})
        report(arguments.run_dir, labels[test_rows], {"this run": scores(model, *test.tensors[:2])} | baselines(train, test))


if __name__ == "__main__":
    main()
