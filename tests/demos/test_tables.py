"""CSV files: what is read, what is refused and where it is wrong, and columns as model inputs."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest

from unisono.demos._tables import Features, Words, read_csv
from unisono.errors import DataError

SMALL = 'day,city,"sales, gross"\n1,Bonn,2.5\n2,"Bad\nEms",NA\n3,Bonn,-1e2\n'


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_columns_are_numbers_or_words_by_their_first_known_value(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path / "t.csv", "\ufeff" + SMALL))
    assert list(table.columns) == ["day", "city", "sales, gross"]
    assert table.numbers("day").tolist() == [1, 2, 3]
    city = table.words("city")
    assert [city.vocabulary[code] for code in city.codes] == ["Bonn", "Bad\nEms", "Bonn"]
    np.testing.assert_array_equal(table.numbers("sales, gross", complete=False), [2.5, np.nan, -100])


def test_a_table_reads_the_same_plain_gzipped_and_zipped(tmp_path: Path) -> None:
    plain = read_csv(write(tmp_path / "t.csv", SMALL))
    with gzip.open(tmp_path / "t.csv.gz", "wb") as packed:
        packed.write(SMALL.encode())
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("inside.csv", SMALL)
    for name in ("t.csv.gz", "t.zip"):
        other = read_csv(tmp_path / name)
        np.testing.assert_array_equal(other.numbers("day"), plain.numbers("day"))
        assert other.words("city").vocabulary == plain.words("city").vocabulary


def test_what_comes_late_in_a_long_file_is_still_named_by_its_row(tmp_path: Path) -> None:
    rows = [f"{number}," for number in range(45_000)]
    rows[30_000] = "30000,late"
    table = read_csv(write(tmp_path / "t.csv", "n,word\n" + "\n".join(rows)))
    words = table.words("word")
    assert np.flatnonzero(words.codes >= 0).tolist() == [30_000]
    rows[41_234] = "many,"
    with pytest.raises(DataError, match=r"row 41236, column 'n': 'many' is not a number"):
        read_csv(write(tmp_path / "t.csv", "n,word\n" + "\n".join(rows)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"t\.csv is empty"),
        ("a,b\n", "has a header row and no data"),
        ("a,b\n1,2\n3\n", "row 3 has 1 fields, the header has 2"),
        ("a,b\n1,2\n\n3,4\n", "row 3 is empty"),
        ("a,a\n1,2\n", "row 1: two columns are called 'a'"),
        ("a,b\n1,2\n1,inf\n", "row 3, column 'b': 'inf' is infinite"),
        ("a,b\n1,2\nx,2\n", "row 3, column 'a': 'x' is not a number"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_the_place(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_csv(write(tmp_path / "t.csv", content))


def test_bytes_that_are_no_text_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_csv(tmp_path / "t.csv")
    for name in ("t.zip", "t.csv.gz"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(DataError, match="cannot be read"):
            read_csv(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("1.csv", SMALL)
        archive.writestr("2.csv", SMALL)
    with pytest.raises(DataError, match="holds 2 CSV files"):
        read_csv(tmp_path / "two.zip")


def test_a_missing_value_and_words_for_numbers_are_named_where_they_are_asked_for(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path / "t.csv", SMALL))
    with pytest.raises(DataError, match="row 3, column 'sales, gross': the value is missing"):
        table.numbers("sales, gross")
    with pytest.raises(DataError, match="row 2, column 'city': 'Bonn' is not a number"):
        table.numbers("city")
    with pytest.raises(DataError, match="has no column 'town'; there are: day, city"):
        table.words("town")


def test_features_standardise_by_the_training_rows_flag_what_is_missing_and_know_unknown_words(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path / "t.csv", "x,w\n1,a\n3,b\nNA,a\n5,new\n"))
    features = Features.from_json(Features.fit(table.take(slice(0, 3))).to_json())
    numbers, codes = features.encode(table)
    np.testing.assert_allclose(numbers, [[-1, 0], [1, 0], [0, 1], [3, 0]])
    assert codes[:, 0].tolist() == [1, 2, 1, 0]
    assert (features.width, features.sizes) == (2, [3])


def test_a_column_of_words_is_found_again_though_a_new_file_makes_numbers_of_it(tmp_path: Path) -> None:
    train = read_csv(write(tmp_path / "t.csv", "w,x\nb7,1\n12,2\n"))
    assert isinstance(train.columns["w"], Words)
    features = Features.fit(train)
    _, codes = features.encode(read_csv(write(tmp_path / "n.csv", "w,x\n12,1\n13,1\n")))
    assert codes[:, 0].tolist() == [2, 0]
