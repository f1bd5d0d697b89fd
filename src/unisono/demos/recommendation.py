"""Recommendation: which films will a user like? MovieLens 100k, or a CSV of your own with columns user, item and rating.

Two models in one run. One predicts ratings: matrix factorisation, its factors made from what else the user rated, who else rated
the film, and what is known of both. The other ranks: two towers, taught with sampled negatives to place liked films above others.

    unisono demo recommendation --workers 2
    unisono demo recommendation --data ratings.csv --run-dir runs/mine    # columns user, item, rating and perhaps title
    unisono demo recommendation --predict 42                              # films for user 42
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono.demos import _application as application
from unisono.demos._data import obtain
from unisono.demos._ratings import MOVIELENS, Known, Ratings, read_ratings
from unisono.report.attachments import DataTable, attach

MICROBATCHES = 4
TEST_SHARE = 0.2
TOP = 20
NEGATIVES = 300
WIDTH, FACTORS = 64, 32


class Tower(nn.Module):
    """One side: its own embedding, its features, and a sum over what it was rated with, less the pair that is asked for."""

    def __init__(self, count: int, others: int, features: Tensor, out: int) -> None:
        super().__init__()
        self.known = torch.cat([features, torch.ones(count, 1)], dim=1)  # there may be no features at all
        self.own, self.features = nn.Embedding(count, WIDTH), nn.Linear(self.known.shape[1], WIDTH, bias=False)
        self.history = nn.Parameter(torch.randn(2 * others, WIDTH) * 0.03)
        self.out = nn.Linear(WIDTH, out)
        nn.init.normal_(self.own.weight, std=0.1)

    def forward(self, side: Tensor, other: Tensor | None, rating: Tensor, rated: Tensor) -> Tensor:
        """``side`` and ``other`` ``int64 [N]``; the matrices ``[count, others]``. While it trains, rows have rated ``other``."""
        history: Tensor = self.history
        if self.training:  # whole columns at a time, which is cheap
            history = history * (torch.rand(len(history), 1) > 0.2) / 0.8
        unique, place = torch.unique(side, return_inverse=True)
        seen = (torch.cat([rating[unique], rated[unique]], dim=1) @ history)[place]
        count = rated[side].sum(dim=1, keepdim=True)
        if other is not None:
            seen = seen - rating[side, other][:, None] * history[other] - history[other + rated.shape[1]]
            count = count - 1
        hidden = self.own(side) + self.features(self.known[side]) + seen / count.clamp(min=1).sqrt()
        result: Tensor = self.out(F.dropout(F.silu(hidden), 0.5, self.training))
        return result


class Recommender(nn.Module):
    """The two models over the same ratings."""

    def __init__(self, ratings: Ratings, known: Known) -> None:
        super().__init__()
        users, items = known.rated.shape
        self.data = known
        self.rating_user = Tower(users, items, ratings.user_features, FACTORS + 1)
        self.rating_item = Tower(items, users, ratings.item_features, FACTORS + 1)
        self.ranking_user = Tower(users, items, ratings.user_features, FACTORS)
        self.ranking_item = nn.Embedding(items, FACTORS)
        self.item_features = torch.cat([ratings.item_features, torch.ones(items, 1)], dim=1)
        self.ranking_features = nn.Linear(self.item_features.shape[1], FACTORS, bias=False)
        self.popularity = nn.Embedding(items, 1)
        nn.init.normal_(self.ranking_item.weight, std=0.1)
        nn.init.zeros_(self.popularity.weight)

    def rating(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings ``float32 [N]`` of pairs."""
        data, known = self.data, self.training
        user = self.rating_user(users, items if known else None, data.rating, data.rated)
        item = self.rating_item(items, users if known else None, data.rating.T, data.rated.T)
        product = (user[:, 1:] * item[:, 1:]).sum(dim=1) / math.sqrt(FACTORS)
        result: Tensor = data.mean + user[:, 0] + item[:, 0] + product
        return result

    def scores(self, users: Tensor, known_items: Tensor | None, items: Tensor) -> Tensor:
        """How well each of ``items`` ``[K]`` suits each of ``users`` ``[N]``: ``[N, K]``."""
        user = self.ranking_user(users, known_items, self.data.rating, self.data.rated)
        item = self.ranking_item(items) + self.ranking_features(self.item_features[items])
        result: Tensor = user @ item.T + self.popularity(items).squeeze(1)
        return result


def loss(model: Recommender, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    """Squared error of ratings, and for what was liked the cross-entropy against sampled films that the user has not rated."""
    users, items, values = batch
    total = F.mse_loss(model.rating(users, items), values, reduction="sum")
    liked = values >= model.data.enough
    users, items = users[liked], items[liked]
    if len(users):
        negatives = torch.randint(model.data.rated.shape[1], (NEGATIVES,))
        scores = model.scores(users, items, torch.cat([items, negatives]))
        positive, others = scores[:, : len(items)].diagonal(), scores[:, len(items) :]
        others = others.masked_fill(model.data.rated[users][:, negatives] > 0, -1e9)
        total = total + F.cross_entropy(torch.cat([positive[:, None], others], dim=1), torch.zeros_like(users), reduction="sum")
    return total, len(values)


def squared_error(model: Recommender, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.mse_loss(model.rating(*batch[:2]).clamp(model.data.low, model.data.high), batch[2], reduction="sum"), len(batch[2])


def split(ratings: Ratings) -> tuple[Tensor, Tensor]:
    """Rows to train on and a random fifth to test on, the same in every run."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(ratings.values)))
    test = int(len(order) * TEST_SHARE)
    if not test:
        raise unisono.DataError(f"{len(order)} ratings are too few: a fifth of them is for the test")
    return order[test:], order[:test]


def recall(scores: Tensor, known: Known, relevant: Tensor) -> float:
    """Of the films that a user liked in the test, the share among the ``TOP`` best that are new to the user; mean over users."""
    best = scores.masked_fill(known.rated > 0, -math.inf).topk(min(TOP, scores.shape[1]), dim=1).indices
    count = relevant.sum(dim=1)
    return float((relevant.gather(1, best).sum(dim=1)[count > 0] / count[count > 0]).mean())


def rating_baselines(ratings: Ratings, train: Tensor, test: Tensor) -> dict[str, float]:
    """RMSE of others."""
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import OneHotEncoder

    learned, held_out = train.numpy(), test.numpy()  # a tensor of one index would give no array
    pairs = torch.stack([ratings.users, ratings.items], dim=1).numpy()
    values = ratings.values.numpy()
    known = values[learned].mean()
    sums = np.bincount(pairs[learned, 1], values[learned] - known, len(ratings.titles))
    counts = np.bincount(pairs[learned, 1], minlength=len(ratings.titles))
    encoder = OneHotEncoder(handle_unknown="ignore").fit(pairs[learned])
    ridge = Ridge(5.0).fit(encoder.transform(pairs[learned]), values[learned])
    found = {
        "user and item effects (Ridge)": ridge.predict(encoder.transform(pairs[held_out])),
        "each item's mean": (known + sums / np.maximum(counts, 1))[pairs[held_out, 1]],
        "the mean of all": np.full(len(held_out), known),
    }
    return {name: float(np.sqrt(np.mean((rating - values[held_out]) ** 2))) for name, rating in found.items()}


def ranking_baselines(known: Known, relevant: Tensor) -> dict[str, float]:
    """recall of others that know the same liked films."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.metrics.pairwise import cosine_similarity

    liked = known.liked.numpy()
    factors = TruncatedSVD(min(32, min(liked.shape) - 1), random_state=0).fit(liked)
    found = {
        "truncated SVD": factors.inverse_transform(factors.transform(liked)),
        "item neighbours (cosine)": liked @ (cosine_similarity(liked.T) - np.eye(liked.shape[1])),
        "most popular": np.tile(liked.sum(axis=0), (len(liked), 1)),
    }
    return {name: recall(torch.from_numpy(scores).float(), known, relevant) for name, scores in found.items()}


@torch.no_grad()
def recommend(model: Recommender, ratings: Ratings, user: int, count: int = 10) -> list[tuple[str, float]]:
    """The films that rank highest among those that the user has not rated, with the rating that the user may give."""
    model.eval()
    items = torch.arange(len(ratings.titles))
    scores = model.scores(torch.tensor([user]), None, items)[0].masked_fill(model.data.rated[user] > 0, -math.inf)
    best = scores.topk(min(count, int((model.data.rated[user] == 0).sum()))).indices
    values = model.rating(torch.full_like(best, user), best).clamp(model.data.low, model.data.high)
    return [(ratings.titles[item], round(float(value), 1)) for item, value in zip(best, values, strict=True)]


def predict(model: Recommender, ratings: Ratings, run_dir: str, user: str) -> None:
    """Prints what is recommended to a user."""
    application.trained(run_dir, "recommendation")
    application.load_weights(model, run_dir)
    for title, rating in recommend(model, ratings, ratings.user(user)):
        print(f"{rating:.1f}  {title}")


def main() -> None:
    parser = application.options(
        "recommendation",
        "Predict ratings, and recommend what users will like.",
        epochs=10,
        batch_size=2000,
        data="MovieLens 100k as zip or folder, or a CSV with columns user, item and rating; default: MovieLens 100k",
        predict="recommend films to user X",
    )
    arguments = parser.parse_args()
    world = unisono.World.from_environment().at_most(MICROBATCHES)
    ratings = read_ratings(obtain(MOVIELENS, arguments.data, world))
    train_rows, test_rows = split(ratings)
    known = Known(ratings, train_rows)
    if not (ratings.values[test_rows] >= known.enough).any():
        raise unisono.DataError(
            f"of {len(test_rows)} ratings for the test none is {known.enough:g} or more: give it more ratings"
        )
    torch.manual_seed(arguments.seed)
    model = Recommender(ratings, known)
    if arguments.predict is not None:
        return predict(model, ratings, arguments.run_dir, arguments.predict) if world.is_main else None

    train, test = (TensorDataset(ratings.users[r], ratings.items[r], ratings.values[r]) for r in (train_rows, test_rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1.0)
    steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    shown = application.Evaluation(test, {"mean squared error": squared_error}, batch_size=5000, every=1, epochs=arguments.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    settings = application.settings(arguments, MICROBATCHES)
    trainer = unisono.Trainer(model, optimizer, loss, scheduler=schedule, callbacks=[shown], **settings)
    trainer.fit(train, epochs=arguments.epochs)
    result = shown.measure(trainer)
    if not trainer.world.is_main:
        return
    run_dir = arguments.run_dir
    application.keep_settings(run_dir, {"demo": "recommendation"})
    values = {"this run": math.sqrt(result["mean squared error"])} | rating_baselines(ratings, train_rows, test_rows)
    title = f"Ratings, {len(test):,} of {len(ratings.values):,} held out"
    application.compare(run_dir, title, "root mean squared error in stars", values, higher_is_better=False)

    relevant = torch.zeros_like(known.rated)
    relevant[ratings.users[test_rows], ratings.items[test_rows]] = (ratings.values[test_rows] >= known.enough).float()
    with torch.no_grad():
        scores = model.eval().scores(torch.arange(len(ratings.user_names)), None, torch.arange(len(ratings.titles)))
    values = {"this run": recall(scores, known, relevant)} | ranking_baselines(known, relevant)
    title, measure = f"Films liked in the test that are among the {TOP} recommended", f"recall@{TOP}"
    application.compare(run_dir, title, measure, values, higher_is_better=True)
    rows, title = recommend(model, ratings, 0), f"For user {ratings.user_names[0]}"
    print(f"\n{title}:\n" + "\n".join(f"  {rating:.1f}  {film}" for film, rating in rows))
    attach(run_dir, title, DataTable(columns=["film", "expected rating"], rows=rows))


if __name__ == "__main__":
    main()
