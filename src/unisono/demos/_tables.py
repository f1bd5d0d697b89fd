"""Tables for the demos: CSV files read with errors that name file, row and column, and columns made into model inputs."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unisono.errors import DataError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"})
"""What stands for "not known" in a CSV file."""

_BLOCK_ROWS = 20_000


@dataclass(frozen=True)
class Words:
    """A column of text: row i holds ``vocabulary[codes[i]]``; -1 where nothing is known."""

    codes: Integers
    vocabulary: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Columns of equal length: numbers (``float64 [N]``, NaN where nothing is known) or words."""

    file: str
    columns: Mapping[str, Floats | Words]

    def __len__(self) -> int:
        first = next(iter(self.columns.values()))
        return len(first.codes if isinstance(first, Words) else first)

    def numbers(self, name: str, *, complete: bool = True) -> Floats:
        """*local*. A column of numbers.

        Raises:
            DataError: There is no such column, it holds text, or (``complete``) a value is missing.
        """
        column = self._column(name)
        if isinstance(column, Words):
            if (column.codes < 0).all():
                raise DataError(f"{self.file}: column {name!r} is empty, numbers are needed there")
            first = int(np.argmax(column.codes >= 0))
            raise self.error(first, name, f"{column.vocabulary[column.codes[first]]!r} is not a number")
        if complete and np.isnan(column).any():
            row = int(np.argmax(np.isnan(column)))
            raise self.error(row, name, "the value is missing. Fill it in, or leave the row out.")
        return column

    def error(self, row: int, name: str, what: str) -> DataError:
        """*local*. The error that something is wrong in a row, counted from 0, of a column."""
        return DataError(f"{self.file}, row {row + 2}, column {name!r}: {what}")

    def words(self, name: str) -> Words:
        """*local*. A column as text, also if it holds numbers.

        Raises:
            DataError: There is no such column.
        """
        column = self._column(name)
        if isinstance(column, Words):
            return column
        values, codes = np.unique(column[~np.isnan(column)], return_inverse=True)
        all_codes = np.full(len(column), -1, dtype=np.int64)
        all_codes[~np.isnan(column)] = codes
        return Words(all_codes, [f"{value:g}" for value in values])

    def take(self, rows: Integers | slice) -> Table:
        """*local*. Some of the rows."""
        return Table(
            self.file,
            {
                name: Words(column.codes[rows], column.vocabulary) if isinstance(column, Words) else column[rows]
                for name, column in self.columns.items()
            },
        )

    def _column(self, name: str) -> Floats | Words:
        if name not in self.columns:
            raise DataError(f"{self.file} has no column {name!r}; there are: {', '.join(self.columns)}")
        return self.columns[name]


def read_csv(path: Path) -> Table:
    """*local*. Reads a CSV file with a header row; also gzipped, or the only file of a zip archive.

    A column holds numbers if its first known value is one. Row numbers in errors count the header as row 1.

    Raises:
        DataError: The file is empty or no CSV, a row has another number of fields, or text stands in a column of numbers.
    """
    columns: dict[str, _Column] = {}
    with _opened(path) as lines:
        reader = csv.reader(lines)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise DataError(f"{path} is empty: a header row and at least one row of data are needed")
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(f"{path}, row 1: two columns are called {twice!r}. Each needs a name of its own.")
            columns = {name: _Column(path, name) for name in header}
            # In blocks, so that little text is in memory at a time.
            for first in itertools.count(2, _BLOCK_ROWS):
                block = list(itertools.islice(reader, _BLOCK_ROWS))
                if not block:
                    break
                _check_fields(path, block, first, len(header))
                for column, values in zip(columns.values(), zip(*block, strict=True), strict=True):
                    column.add(values, first)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as a UTF-8 CSV file"
            ) from None
        except csv.Error as error:
            raise DataError(f"{path}, row {reader.line_num}: no CSV ({error})") from None
    if not next(iter(columns.values())).parts:
        raise DataError(f"{path} has a header row and no data: at least one row is needed")
    return Table(str(path), {name: column.whole() for name, column in columns.items()})


def _check_fields(path: Path, rows: Sequence[Sequence[str]], first: int, fields: int) -> None:
    for number, row in enumerate(rows, start=first):
        if not row:
            raise DataError(f"{path}, row {number} is empty. Delete it.")
        if len(row) != fields:
            raise DataError(
                f"{path}, row {number} has {len(row)} fields, the header has {fields}. Is a comma missing or too many?"
            )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".csv")]
                if len(names) != 1:
                    raise DataError(
                        f"{path} holds {len(names)} CSV files: give it exactly one, or unpack it and pass the CSV file"
                    )
                with archive.open(names[0]) as inside:
                    yield io.TextIOWrapper(inside, encoding="utf-8-sig", newline="")
        elif path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as text:
                yield text
        else:
            with path.open(encoding="utf-8-sig", newline="") as text:
                yield text
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


class _Column:
    """A column while it is read."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.parts: list[Floats | Integers] = []
        self._is_text: bool | None = None
        self._codes: dict[str, int] = {}

    def add(self, values: Sequence[str], first: int) -> None:
        """The next values; ``first`` is the number of their first row."""
        if self._is_text is None:
            known = next((value for value in values if value.strip() not in MISSING), None)
            self._is_text = None if known is None else not _is_number(known)
        if self._is_text:
            stripped = [value.strip() for value in values]
            codes = [-1 if v in MISSING else self._codes.setdefault(v, len(self._codes)) for v in stripped]
            self.parts.append(np.array(codes, dtype=np.int64))
            return
        try:
            numbers = np.array(["nan" if value.strip() in MISSING else value for value in values], dtype=np.float64)
        except ValueError:
            row = next(i for i, value in enumerate(values) if value.strip() not in MISSING and not _is_number(value))
            raise DataError(
                f"{self.path}, row {first + row}, column {self.name!r}: {values[row]!r} is not a number, but the column's first "
                "value is one. Correct it, or leave the field empty."
            ) from None
        if np.isinf(numbers).any():
            row = int(np.argmax(np.isinf(numbers)))
            raise DataError(f"{self.path}, row {first + row}, column {self.name!r}: {values[row]!r} is infinite. Correct it.")
        self.parts.append(numbers)

    def whole(self) -> Floats | Words:
        if not self._is_text:
            return np.concatenate(self.parts).astype(np.float64)
        # Blocks before the first known value were read as numbers, all of them missing.
        parts = [np.full(len(part), -1) if part.dtype == np.float64 else part for part in self.parts]
        return Words(np.concatenate(parts).astype(np.int64), list(self._codes))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Features:
    """How columns become model inputs. Fitted on training rows; kept beside the weights, so that others are treated alike."""

    numbers: Mapping[str, tuple[float, float]]
    """Column of numbers -> mean and standard deviation."""
    words: Mapping[str, Sequence[str]]
    """Column of words -> the words known; code 0 is for all others, the first word has code 1."""

    @classmethod
    def fit(cls, table: Table, *, leave_out: Sequence[str] = (), most_words: int = 254) -> Features:
        """*local*. From a table's columns, less ``leave_out``; of each column of words the ``most_words`` most frequent.

        Raises:
            DataError: No column is left.
        """
        numbers: dict[str, tuple[float, float]] = {}
        words: dict[str, list[str]] = {}
        for name, column in table.columns.items():
            if name in leave_out:
                continue
            if isinstance(column, Words):
                counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.vocabulary))
                order = np.argsort(-counts, kind="stable")[:most_words]
                words[name] = [column.vocabulary[code] for code in order if counts[code] > 0]
            elif not np.isnan(column).all():
                numbers[name] = (float(np.nanmean(column)), float(np.nanstd(column)) or 1.0)
        if not numbers and not words:
            raise DataError(f"{table.file} has no column to learn from besides {', '.join(leave_out)}")
        return cls(numbers=numbers, words=words)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Features:
        """What ``to_json`` made."""
        return cls(numbers={name: (mean, std) for name, (mean, std) in data["numbers"].items()}, words=dict(data["words"]))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"numbers": {k: list(v) for k, v in self.numbers.items()}, "words": {k: list(v) for k, v in self.words.items()}}

    @property
    def width(self) -> int:
        """Columns of the array of numbers: each with a flag that says whether its value is missing."""
        return 2 * len(self.numbers)

    @property
    def sizes(self) -> list[int]:
        """For each column of words, how many codes there are."""
        return [len(words) + 1 for words in self.words.values()]

    def encode(self, table: Table) -> tuple[Tensor, Tensor]:
        """*local*. Standardised numbers with missing ones as 0 and their flags, ``float32 [N, width]``, and codes
        ``int64 [N, len(sizes)]``.

        Raises:
            DataError: A column is missing, or holds text where numbers are needed.
        """
        values = torch.zeros(len(table), self.width)
        for place, (name, (mean, std)) in enumerate(self.numbers.items()):
            column = (torch.from_numpy(table.numbers(name, complete=False)) - mean) / std
            values[:, place] = column.nan_to_num(0.0)
            values[:, place + len(self.numbers)] = column.isnan()
        codes = torch.zeros(len(table), len(self.words), dtype=torch.int64)
        for place, (name, known) in enumerate(self.words.items()):
            column_words = table.words(name)
            number = {word: code for code, word in enumerate(known, start=1)}
            new = np.array([number.get(word, 0) for word in column_words.vocabulary] + [0], dtype=np.int64)
            codes[:, place] = torch.from_numpy(new[column_words.codes])  # -1, not known, is the last: 0
        return values, codes

    def datasets(self, table: Table, target: Floats, *parts: Integers) -> list[TensorDataset]:
        """*local*. For each part, given by its rows: numbers and codes as from ``encode``, and the target ``float32 [N]``."""
        columns = (*self.encode(table), torch.from_numpy(target.astype(np.float32)))
        return [TensorDataset(*(column[rows] for column in columns)) for rows in parts]


class TableNet(nn.Module):
    """What nets on tables have in common: an embedding for each column of words. ``inputs`` gives their layers ``inputs_width``
    numbers."""

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        dimensions = [min(16, 2 + size // 4) for size in sizes]
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size, dim in zip(sizes, dimensions, strict=True))
        self.inputs_width = 2 * width + sum(dimensions)

    def inputs(self, numbers: Tensor, codes: Tensor, *, limit: float) -> Tensor:
        """Numbers ``[N, width]``, cut off at ``limit``, with a signed logarithm beside each, and codes ``[N, C]`` as one input.

        Delays, amounts and risks have long tails, which a net treats badly without the logarithm.
        """
        logs = torch.sign(numbers) * torch.log1p(numbers.abs())
        words = [embedding(codes[:, i]) for i, embedding in enumerate(self.embeddings)]
        return torch.cat([numbers.clamp(-limit, limit), logs, *words], dim=1)


def for_sklearn(*parts: TensorDataset) -> tuple[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], list[int], Any]:
    """*local*. The same columns for baselines: each part's inputs and target, the columns that hold codes, and a transformer that
    makes these one-hot."""
    from sklearn.compose import make_column_transformer
    from sklearn.preprocessing import OneHotEncoder

    arrays = [(np.concatenate(part.tensors[:2], axis=1), part.tensors[2].numpy()) for part in parts]
    words = list(range(parts[0].tensors[0].shape[1], arrays[0][0].shape[1]))
    return arrays, words, make_column_transformer((OneHotEncoder(handle_unknown="ignore"), words), remainder="passthrough")
