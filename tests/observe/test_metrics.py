from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.observe.metrics import METRICS_FILE, MetricsLog, read_metrics


class MemoryStore:
    """Files in a dict, and a count of the writes."""

    def __init__(self, data: bytes | None = None) -> None:
        self.files = {} if data is None else {METRICS_FILE: data}
        self.appends = 0
        self.full = False

    def exists(self, path: str) -> bool:
        return path in self.files

    def read(self, path: str) -> bytes:
        return self.files[path]

    def write(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def append(self, path: str, text: str) -> None:
        if self.full:
            self.files[path] = self.files.get(path, b"") + text.encode()[: len(text) // 2]
            raise CheckpointError("disk full")
        self.appends += 1
        self.files[path] = self.files.get(path, b"") + text.encode()


class Clock:
    """Time that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(*steps: int) -> bytes:
    return b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in steps)


def steps_in(store: MemoryStore) -> list[object]:
    return [record["step"] for record in read_metrics(store)]


scalars = (
    st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text().filter(lambda text: text not in ("nan", "inf", "-inf"))
)
records = st.dictionaries(st.text(), scalars).flatmap(
    lambda fields: st.integers(0, 10**9).map(lambda step: {**fields, "step": step})
)


@given(st.lists(records, max_size=5))
def test_any_record_is_read_back_as_it_was_written(written: list[dict[str, int | float | str]]) -> None:
    store = MemoryStore()
    log = MetricsLog(store)
    for record in written:
        log.append(record)
    log.close()
    read = read_metrics(store)
    assert [list(record) for record in read] == [list(record) for record in written]
    for old, new in zip(written, read, strict=True):
        # repr tells 1 from 1.0, 0.0 from -0.0, and makes nan equal to nan.
        assert {key: repr(value) for key, value in new.items()} == {key: repr(value) for key, value in old.items()}


def test_what_is_not_finite_is_written_as_strings_in_strict_json() -> None:
    store = MemoryStore()
    log = MetricsLog(store)
    log.append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    log.close()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    assert json.loads(store.files[METRICS_FILE], parse_constant=refuse) == {
        "step": 1,
        "a": "nan",
        "b": "inf",
        "c": "-inf",
    }


def test_lines_are_written_together_about_once_a_second() -> None:
    store, clock = MemoryStore(), Clock()
    log = MetricsLog(store, clock=clock)
    for step in range(1, 101):
        clock.now += 1 / 16
        log.append({"step": step})
    assert store.appends == 6
    log.close()
    assert steps_in(store) == list(range(1, 101))


def test_flush_writes_what_is_in_memory_at_once() -> None:
    store = MemoryStore()
    log = MetricsLog(store, clock=Clock())
    log.append({"step": 1})
    assert not store.exists(METRICS_FILE)
    log.flush()
    assert steps_in(store) == [1]


@pytest.mark.parametrize("torn_at", range(1, len(lines(4))))
def test_resume_drops_a_line_torn_anywhere(torn_at: int) -> None:
    store = MemoryStore(lines(1, 2, 3) + lines(4)[:torn_at])
    complete = torn_at == len(lines(4)) - 1
    log = MetricsLog(store)
    log.resume(4)
    log.append({"step": 5, "loss": 0.5})
    log.close()
    assert store.files[METRICS_FILE] == (lines(1, 2, 3, 4, 5) if complete else lines(1, 2, 3, 5))


def test_resume_drops_the_lines_after_the_checkpoint() -> None:
    store = MemoryStore(lines(1, 2, 3, 4, 5))
    MetricsLog(store).resume(3)
    assert store.files[METRICS_FILE] == lines(1, 2, 3)


def test_resume_at_step_zero_begins_anew() -> None:
    store = MemoryStore(lines(1, 2))
    MetricsLog(store).resume(0)
    assert store.files[METRICS_FILE] == b""


def test_resume_without_a_file_makes_none() -> None:
    store = MemoryStore()
    MetricsLog(store).resume(7)
    assert store.files == {}


def test_reading_leaves_out_a_torn_last_line() -> None:
    assert steps_in(MemoryStore(lines(1, 2) + b'{"step": 3, "na\xc3')) == [1, 2]


def test_reading_without_a_file_gives_nothing() -> None:
    assert read_metrics(MemoryStore()) == []


@pytest.mark.parametrize("bad", [b"\x00\x00", b"", b"[1]", b'{"loss": 1}', b'{"step": true}', b'{"step": 1', b"\xff"])
def test_a_damaged_line_in_the_middle_is_named(bad: bytes) -> None:
    store = MemoryStore(lines(1, 2) + bad + b"\n" + lines(4))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 3 is damaged") as caught:
        read_metrics(store)
    assert caught.value.file == METRICS_FILE
    with pytest.raises(CheckpointError, match="line 3"):
        MetricsLog(store).resume(2)


@pytest.mark.parametrize("record", [{"loss": 1.0}, {"step": 1.0}, {"step": True}, {}])
def test_a_record_without_a_step_is_refused(record: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="'step'"):
        MetricsLog(MemoryStore()).append(record)


def test_a_value_that_is_no_scalar_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"'loss' is .* a list"):
        MetricsLog(MemoryStore()).append({"step": 1, "loss": [1.0]})  # type: ignore[dict-item]


def test_after_a_failed_write_nothing_more_is_written() -> None:
    store = MemoryStore(lines(1))
    log = MetricsLog(store)
    log.append({"step": 2})
    store.full = True
    with pytest.raises(CheckpointError, match="disk full"):
        log.flush()
    store.full = False
    with pytest.raises(CheckpointError, match="closed"):
        log.append({"step": 3})
    log.close()
    assert steps_in(store) == [1]


def test_it_works_on_a_run_directory(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    log = MetricsLog(store)
    log.resume(0)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": math.nan})
    log.close()
    again = MetricsLog(store)
    again.resume(2)
    again.append({"step": 3, "loss": 1.5})
    again.close()
    assert (tmp_path / "run" / METRICS_FILE).read_text() == (
        '{"step": 1, "loss": "nan"}\n{"step": 2, "loss": "nan"}\n{"step": 3, "loss": 1.5}\n'
    )
