"""Ratings of films: MovieLens 100k as its zip, its folder or the copy that comes with RecBole, or a CSV file of one's own."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
_GENRES = """unknown
Action
Adventure
Animation
Children's
Comedy
Crime
Documentary
Drama
Fantasy
Film-Noir
Horror
Musical
Mystery
Romance
Sci-Fi
Thriller
War
Western""".splitlines()
"""In the order of the flags in u.item."""


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
        """*local*. The place of a user.

        Raises:
            ConfigurationError: There is no such user.
        """
        if name not in self.user_names:
            some = ", ".join(self.user_names[:3])
            raise ConfigurationError(f"there is no user {name!r} among the {len(self.user_names):,} users ({some}, ...)")
        return self.user_names.index(name)


class Known:
    """The ratings to learn from, as matrices ``float32 [U, I]``: whether rated, by how much above the mean, whether liked.

    A model reads them; they are no part of its weights.
    """

    def __init__(self, ratings: Ratings, rows: Tensor) -> None:
        shape = (len(ratings.user_names), len(ratings.titles))
        self.mean = float(ratings.values[rows].mean())
        self.low, self.high = float(ratings.values.min()), float(ratings.values.max())
        self.enough = self.low + LIKED * (self.high - self.low)
        self.rated, self.rating = torch.zeros(shape), torch.zeros(shape)
        self.rated[ratings.users[rows], ratings.items[rows]] = 1.0
        self.rating[ratings.users[rows], ratings.items[rows]] = ratings.values[rows] - self.mean
        self.liked = torch.zeros(shape)
        self.liked[ratings.users[rows], ratings.items[rows]] = (ratings.values[rows] >= self.enough).float()


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


def _from_movielens(path: Path) -> Ratings:
    def lines(name: str) -> list[str]:
        try:
            if path.is_dir():
                text = (path / name).read_text(encoding="latin-1")
            else:
                with zipfile.ZipFile(path) as archive:
                    text = archive.read(f"ml-100k/{name}").decode("latin-1")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: {name} of MovieLens 100k cannot be read ({error})") from None
        return text.splitlines()

    people = _fields(f"{path}/u.user", lines("u.user"), "|", 5, 1)
    films = _fields(f"{path}/u.item", lines("u.item"), "|", 5 + len(_GENRES), 1)
    genres = [[name for name, flag in zip(_GENRES, film[5:], strict=True) if flag == "1"] for film in films]
    data = [line.split("\t") for line in lines("u.data")]
    return _tables(f"{path}/u.data", data, 1, _people(f"{path}/u.user", people, 1), [(f[0], f[1]) for f in films], genres)


def _from_recbole(path: Path) -> Ratings:
    def rows(ending: str) -> list[str]:
        try:
            text = (path / f"ml-100k.{ending}").read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}/ml-100k.{ending} cannot be read ({error})") from None
        return text.splitlines()[1:]

    films = _fields(f"{path}/ml-100k.item", rows("item"), "\t", 4, 2)
    people = _people(f"{path}/ml-100k.user", _fields(f"{path}/ml-100k.user", rows("user"), "\t", 5, 2), 2)
    titles = [(film[0], f"{film[1]} ({film[2]})") for film in films]
    data = [line.split("\t") for line in rows("inter")]
    return _tables(f"{path}/ml-100k.inter", data, 2, people, titles, [film[3].split() for film in films])


def _fields(file: str, lines: Sequence[str], separator: str, count: int, first: int) -> list[list[str]]:
    """``first`` is the number of the first row in its file."""
    rows = [line.split(separator) for line in lines]
    for number, row in enumerate(rows, start=first):
        if len(row) != count:
            raise DataError(f"{file}, row {number} has {len(row)} fields instead of {count}. Is it the file of MovieLens 100k?")
    return rows


def _people(file: str, rows: list[list[str]], first: int) -> list[list[str]]:
    for number, row in enumerate(rows, start=first):
        if not row[1].isdecimal():
            raise DataError(f"{file}, row {number}, column age: {row[1]!r} is no number")
    return rows


def _tables(
    file: str,
    rows: list[list[str]],
    first: int,
    people: list[list[str]],
    films: list[tuple[str, str]],
    genres: list[list[str]],
) -> Ratings:
    """``people``: id, age, gender, occupation, zip code. ``first`` is the number of the first row in its file."""
    user_place = {person[0]: place for place, person in enumerate(people)}
    item_place = {film: place for place, (film, _) in enumerate(films)}

    def column(name: str, place: int, convert: Callable[[str], float], wrong: str) -> npt.NDArray[np.float64]:
        values = np.empty(len(rows))
        for number, row in enumerate(rows):
            try:
                values[number] = convert(row[place])
            except (KeyError, ValueError, IndexError):
                found = row[place] if len(row) > place else "nothing"
                raise DataError(f"{file}, row {number + first}, column {name}: {found!r} {wrong}") from None
        return values

    users = column("user", 0, user_place.__getitem__, f"is not among the {len(people):,} users")
    items = column("item", 1, item_place.__getitem__, f"is not among the {len(films):,} films")
    values = column("rating", 2, float, "is no number")
    occupations = sorted({person[3] for person in people})
    known = [name for name in _GENRES if any(name in genre for genre in genres)]
    return Ratings(
        users=torch.from_numpy(users).long(),
        items=torch.from_numpy(items).long(),
        values=torch.from_numpy(values).float(),
        user_names=[person[0] for person in people],
        titles=[title for _, title in films],
        user_features=torch.tensor(
            [[float(p[2] == "F"), (float(p[1]) - 30) / 15, *(float(p[3] == name) for name in occupations)] for p in people]
        ),
        item_features=torch.tensor([[float(name in genre) for name in known] for genre in genres]),
    )


def _from_csv(path: Path) -> Ratings:
    table = read_csv(path)
    users, items = table.words("user"), table.words("item")
    for name, column in (("user", users), ("item", items)):
        if (column.codes < 0).any():
            raise DataError(f"{path}, row {int(np.argmax(column.codes < 0)) + 2}, column {name!r}: the value is missing")
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
        raise DataError(f"{file}, rating {row + 1}: {float(ratings.values[row])} is no rating. Correct it.")
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
