"""Ratings of films: MovieLens 100k as its zip, its folder or the copy that comes with RecBole, or a CSV file of one's own."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unisono.demos._data import Download, Source, package_file
from unisono.demos._tables import read_csv
from unisono.errors import ConfigurationError, DataError

MOVIELENS = Source(
    name="MovieLens 100k",
    folder="movielens",
    installed=(package_file("recbole", "dataset_example/ml-100k"),),
    install="pip install --no-deps recbole",
    downloads=(
        Download(
            url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            size=4_924_029,
            sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        ),
    ),
)
# In the order of the flags in u.item.
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip
LIKED = 0.75
"""Of the way from the lowest to the highest rating: 4 stars of 5."""


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """N ratings of I films (or other items) by U users."""

    users: Tensor
    """``int64 [N]``: places in ``user_names``."""
    items: Tensor
    """``int64 [N]``: places in ``titles``."""
    values: Tensor
    """``float32 [N]``."""
    user_names: Sequence[str]
    titles: Sequence[str]
    user_features: Tensor
    """``float32 [U, F]``, F may be 0."""
    item_features: Tensor
    """``float32 [I, G]``, G may be 0."""

    def user(self, name: str) -> int:
        """*local*. The place of a user; ConfigurationError if there is no such user."""
        if name not in self.user_names:
            some = ", ".join(self.user_names[:3])
            raise ConfigurationError(f"there is no user {name!r} among the {len(self.user_names):,} users ({some}, ...)")
        return self.user_names.index(name)


class Known:
    """The ratings to learn from, as matrices ``float32 [U, I]``: whether rated, by how much above the mean, whether liked."""

    def __init__(self, ratings: Ratings, rows: Tensor) -> None:
        values, pairs = ratings.values[rows], (ratings.users[rows], ratings.items[rows])
        self.mean = float(values.mean())
        self.low, self.high = float(ratings.values.min()), float(ratings.values.max())
        self.enough = self.low + LIKED * (self.high - self.low)
        self.rated, self.rating, self.liked = torch.zeros(3, len(ratings.user_names), len(ratings.titles)).unbind()
        self.rated[pairs] = 1.0
        self.rating[pairs] = values - self.mean
        self.liked[pairs] = (values >= self.enough).float()


def read_ratings(path: Path) -> Ratings:
    """*local*. Reads a zip or folder of MovieLens 100k, RecBole's folder, or a CSV with user, item, rating and perhaps title.

    Raises:
        DataError: A file is missing or empty, a value is no number, an id is beyond its table, or a rating is there twice.
    """
    if path.is_file() and path.suffix != ".zip":
        return _checked(_from_csv(path), str(path))
    if path.is_dir() and (path / "ml-100k.inter").exists():
        return _checked(_from_recbole(path), str(path / "ml-100k.inter"))
    return _checked(_from_movielens(path), f"{path}/u.data")


@dataclass(frozen=True)
class _Rows:
    """The rows of a file of one of the two formats, split into fields."""

    file: str
    rows: list[list[str]]
    first: int
    """The number of the first of them in the file."""

    def of(self, fields: int) -> list[list[str]]:
        """The rows, which must have so many fields."""
        for number, row in enumerate(self.rows, start=self.first):
            if len(row) != fields:
                raise DataError(
                    f"{self.file}, row {number} has {len(row)} fields instead of {fields}. Is it the file of MovieLens 100k?"
                )
        return self.rows

    def column(self, name: str, place: int, convert: Callable[[str], float], wrong: str) -> Tensor:
        """The values of a column, float64."""
        values = np.empty(len(self.rows))
        for number, row in enumerate(self.rows):
            try:
                values[number] = convert(row[place])
            except (KeyError, ValueError, IndexError):
                found = row[place] if len(row) > place else "nothing"
                raise DataError(f"{self.file}, row {number + self.first}, column {name}: {found!r} {wrong}") from None
        return torch.from_numpy(values)


def _from_movielens(path: Path) -> Ratings:
    def read(name: str, separator: str) -> _Rows:
        try:
            if path.is_dir():
                text = (path / name).read_text(encoding="latin-1")
            else:
                with zipfile.ZipFile(path) as archive:
                    text = archive.read(f"ml-100k/{name}").decode("latin-1")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: {name} of MovieLens 100k cannot be read ({error})") from None
        return _Rows(f"{path}/{name}", [line.split(separator) for line in text.splitlines()], 1)

    films = read("u.item", "|").of(5 + len(_GENRES))
    genres = [[name for name, flag in zip(_GENRES, film[5:], strict=True) if flag == "1"] for film in films]
    return _tables(read("u.data", "\t"), read("u.user", "|"), [film[0] for film in films], [film[1] for film in films], genres)


def _from_recbole(path: Path) -> Ratings:
    def read(ending: str) -> _Rows:
        file = path / f"ml-100k.{ending}"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()[1:]
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error})") from None
        return _Rows(str(file), [line.split("\t") for line in lines], 2)

    films = read("item").of(4)
    titles, genres = [f"{film[1]} ({film[2]})" for film in films], [film[3].split() for film in films]
    return _tables(read("inter"), read("user"), [film[0] for film in films], titles, genres)


def _tables(data: _Rows, user: _Rows, films: list[str], titles: list[str], genres: list[list[str]]) -> Ratings:
    """From ``data`` (user, item, rating), ``user`` (id, age, gender, occupation, zip code), and films' ids, titles and genres."""
    people = user.of(5)
    age = user.column("age", 1, int, "is not a number")
    user_place = {person[0]: place for place, person in enumerate(people)}
    item_place = {film: place for place, film in enumerate(films)}
    occupations = sorted({person[3] for person in people})
    known = [name for name in _GENRES if any(name in genre for genre in genres)]
    about = [[float(person[2] == "F"), 0.0, *(float(person[3] == name) for name in occupations)] for person in people]
    user_features = torch.tensor(about)
    user_features[:, 1] = (age - 30) / 15
    return Ratings(
        users=data.column("user", 0, user_place.__getitem__, f"is not among the {len(people):,} users").long(),
        items=data.column("item", 1, item_place.__getitem__, f"is not among the {len(films):,} films").long(),
        values=data.column("rating", 2, float, "is not a number").float(),
        user_names=[person[0] for person in people],
        titles=titles,
        user_features=user_features,
        item_features=torch.tensor([[float(name in genre) for name in known] for genre in genres]),
    )


def _from_csv(path: Path) -> Ratings:
    table = read_csv(path)
    users, items = table.words("user"), table.words("item")
    for name, column in (("user", users), ("item", items)):
        if (column.codes < 0).any():
            raise table.error(int(np.argmax(column.codes < 0)), name, "the value is missing")
    titles = list(items.vocabulary)
    if "title" in table.columns:
        names = table.words("title")
        for item, code in zip(items.codes, names.codes, strict=True):
            titles[item] = names.vocabulary[code] if code >= 0 else titles[item]
    return Ratings(
        users=torch.from_numpy(users.codes),
        items=torch.from_numpy(items.codes),
        values=torch.from_numpy(table.numbers("rating")).float(),
        user_names=list(users.vocabulary),
        titles=titles,
        user_features=torch.zeros(len(users.vocabulary), 0),
        item_features=torch.zeros(len(titles), 0),
    )


def _checked(ratings: Ratings, file: str) -> Ratings:
    if not len(ratings.values):
        raise DataError(f"{file} holds no ratings")
    if not torch.isfinite(ratings.values).all():
        row = int((~torch.isfinite(ratings.values)).nonzero()[0])
        raise DataError(f"{file}, rating {row + 1}: {float(ratings.values[row])} is not a rating. Correct it.")
    pairs = (ratings.users * len(ratings.titles) + ratings.items).numpy()
    _, first = np.unique(pairs, return_index=True)
    if len(first) < len(pairs):
        row = int(np.setdiff1d(np.arange(len(pairs)), first)[0])
        user, title = ratings.user_names[int(ratings.users[row])], ratings.titles[int(ratings.items[row])]
        raise DataError(f"{file}, rating {row + 1}: user {user} has rated {title!r} before. Keep one rating of each.")
    for name, names in (("user", ratings.user_names), ("item", ratings.titles)):
        if len(names) < 2:
            raise DataError(f"{file} holds ratings of one {name} only: there is nothing to compare, give it two or more")
    return ratings
