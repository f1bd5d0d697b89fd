from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from unisono.errors import CheckpointError
from unisono.observe.summary import Summary, render_plain, show_summary

DIGEST = "0123456789abcdef" * 4


def summary(**changes: object) -> Summary:
    values = {
        "steps": 705, "epochs": 5, "samples": 45_120, "samples_per_second": 18_400.0, "seconds": 2.456, "workers": 4,
        "weights_sha256": DIGEST, "loss": 0.0312, "metrics": {"accuracy": 0.9861}, "waiting_share": 0.04,
        "finished": True, "parameters": 9876, "run_dir": "runs/digits", "bytes_sent_per_step": 38_912.0, **changes,
    }  # fmt: skip
    return Summary(**values)  # type: ignore[arg-type]


def on_terminal(what: Summary, width: int) -> str:
    """What a terminal shows, without its colours."""
    file = io.StringIO()
    show_summary(what, console=Console(file=file, force_terminal=True, width=width))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


GOLDEN = f"""\
Trained in unison
loss                   0.0312
accuracy               0.9861
steps                  705 in 5 epochs
samples                45,120
samples/s              18,400
time                   2.46 s, 4% waiting
workers                4
parameters             9,876
sent per step          38.9 kB
sha256 of the weights  {DIGEST}
Check it: sha256sum runs/digits/model.safetensors
Train again in a new run directory with another number of workers
(unisono run --workers 3 ...) and you will get the same digest.
"""


def test_the_plain_text_is_this() -> None:
    assert render_plain(summary()) == GOLDEN


def test_without_a_terminal_the_plain_text_is_printed_unchanged_at_any_width() -> None:
    file = io.StringIO()
    show_summary(summary(), console=Console(file=file, width=20))
    assert file.getvalue() == GOLDEN


@pytest.mark.parametrize("width", [20, 40, 80])
def test_on_a_terminal_the_digest_is_a_line_of_its_own_and_whole(width: int) -> None:
    assert DIGEST in on_terminal(summary(), width).split("\n")


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_terminal_the_command_that_checks_can_be_copied(width: int) -> None:
    text = on_terminal(summary(run_dir="runs/a rather long name of a run"), width)
    assert "Check it: sha256sum 'runs/a rather long name of a run/model.safetensors'\n" in text


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_terminal_the_table_fits(width: int) -> None:
    text = on_terminal(summary(metrics={"mean_absolute_percentage_error_of_everything": 0.5}), width)
    table = text.split("sha256 of the weights")[0].splitlines()
    assert "Trained in unison" in table[0]
    assert all(len(line) <= width for line in table)


def test_markup_in_a_name_is_shown_as_it_is() -> None:
    odd = summary(metrics={"[red]f1[/] :smile:": 0.5}, run_dir="runs/[bold]x")
    text = on_terminal(odd, 80)
    assert "[red]f1[/] :smile:" in text
    assert "runs/[bold]x/model.safetensors" in text


def test_a_stopped_run_says_where_it_stopped_and_how_to_go_on() -> None:
    text = render_plain(summary(finished=False, steps=120))
    assert text.startswith("Stopped at step 120\n")
    assert "Start the same command again" in text
    assert DIGEST in text


@pytest.mark.parametrize(("workers", "other"), [(1, 2), (2, 1), (8, 7)])
def test_the_number_of_workers_to_try_next_is_another_one(workers: int, other: int) -> None:
    assert f"--workers {other} " in render_plain(summary(workers=workers))


def test_a_single_worker_is_not_told_about_waiting() -> None:
    assert "waiting" not in render_plain(summary(workers=1))


def test_the_run_directory_can_be_named_as_the_user_typed_it() -> None:
    assert "sha256sum ./r/model.safetensors\n" in render_plain(summary(), "./r/")


def test_a_remote_run_directory_is_not_given_to_sha256sum() -> None:
    text = render_plain(summary(run_dir="s3://bucket/run"))
    assert "s3://bucket/run/model.safetensors has this SHA-256" in text
    assert "sha256sum" not in text


def test_the_keys_of_the_json_are_these() -> None:
    assert list(json.loads(summary().to_json())) == [
        "steps", "epochs", "samples", "samples_per_second", "seconds", "workers", "weights_sha256", "loss", "metrics",
        "waiting_share", "finished", "parameters", "run_dir", "bytes_sent_per_step", "data_s", "compute_s",
        "communication_s", "waiting_s", "microbatches", "peak_memory_bytes", "bytes_sent",
    ]  # fmt: skip


def test_shares_are_shown_where_they_are_uneven() -> None:
    assert "microbatches           5.79 + 2.21\n" in render_plain(summary(workers=2, microbatches=[5.789, 2.211]))
    for even in ([4.0, 4.0], [3.0, 3.0, 2.0], [8.0], []):
        assert "microbatches" not in render_plain(summary(microbatches=even))


numbers = st.floats(allow_nan=False)


@given(
    st.builds(
        Summary, steps=st.integers(0), epochs=st.integers(0), samples=st.integers(0), samples_per_second=numbers,
        seconds=numbers, workers=st.integers(1), weights_sha256=st.text(), loss=numbers,
        metrics=st.dictionaries(st.text(), numbers), waiting_share=numbers, finished=st.booleans(),
        parameters=st.integers(0), run_dir=st.text(), bytes_sent_per_step=numbers, data_s=st.lists(numbers),
        compute_s=st.lists(numbers), communication_s=st.lists(numbers), waiting_s=st.lists(numbers),
        microbatches=st.lists(numbers),
        peak_memory_bytes=st.lists(numbers), bytes_sent=st.lists(numbers),
    )
)  # fmt: skip
def test_any_summary_is_read_back_as_it_was_written(written: Summary) -> None:
    assert Summary.from_json(written.to_json()) == written


def test_a_loss_that_is_no_number_makes_strict_json() -> None:
    text = summary(loss=math.nan).to_json()
    assert json.loads(text)["loss"] == "nan"
    assert math.isnan(Summary.from_json(text).loss)


def test_a_run_directory_called_nan_stays_text() -> None:
    assert Summary.from_json(summary(run_dir="nan").to_json()).run_dir == "nan"


def test_a_key_from_a_later_version_is_ignored() -> None:
    assert Summary.from_json(json.dumps({**json.loads(summary().to_json()), "colour": "blue"})) == summary()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "list"), ("{}", "'steps' is missing"), (b"\xff\xfe\xfa", "not JSON")],
)
def test_a_damaged_summary_is_named(text: str | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Summary.from_json(text)
    assert caught.value.file == "summary.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "7"), ("steps", True), ("loss", None), ("loss", "low"), ("finished", 1), ("run_dir", 3),
        ("metrics", []), ("metrics", {"accuracy": "high"}), ("data_s", 1.0), ("waiting_s", ["long"]),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(key: str, value: object) -> None:
    text = json.dumps({**dataclasses.asdict(summary()), key: value})
    with pytest.raises(CheckpointError, match=f"'{key}' is "):
        Summary.from_json(text)


def test_a_summary_of_an_earlier_version_lacks_the_times_of_each_worker() -> None:
    values = json.loads(summary(data_s=[1.0, 2.0]).to_json())
    del values["data_s"]
    assert Summary.from_json(json.dumps(values)) == summary()


def test_the_time_of_a_resumed_run_is_that_since_its_last_start() -> None:
    assert "since the last start" in render_plain(summary(samples=90_000))
    assert "since the last start" not in render_plain(summary())
