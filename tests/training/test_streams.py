"""Streams: one for each microbatch, so that the model is the same for every number of workers, stops and deaths included."""

from __future__ import annotations

import collections
import gzip
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, default_collate, get_worker_info

import unisono
from tests.fault_injection import Death, run_lives
from tests.memory import empty_memory
from tests.training.hard_problem import digest
from tests.training.small_run import Dies, Killed, memory_url
from unisono import Callback, ConfigurationError, DataError, Streams, Trainer
from unisono.data.stream_batches import Positions
from unisono.data.streams import Lane, StreamPlan
from unisono.testing import run_threads

MICROBATCHES, BATCH, EPOCHS = 5, 13, 2
LENGTHS = (13, 5, 16, 10, 3)
"""Of the streams: some end batches before others."""

seen: list[tuple[int, int]] = []
"""What microbatches were made of in this test: stream and place of each sample."""


def sample(stream: int, place: int) -> tuple[Tensor, int, int]:
    generator = torch.Generator().manual_seed(1000 * stream + place)
    inputs = torch.randn(6, generator=generator) + 0.1 * torch.randn(6) + float(np.random.rand()) + random.random()
    return inputs, (stream + place) % 3, 1000 * stream + place


class Lines:
    """A stream that remembers where it is.

    Args:
        stream: Its number.
        lengths: Of all streams.
        counts: Counts reads, by stream.
    """

    def __init__(self, stream: int, lengths: Sequence[int] = LENGTHS, counts: collections.Counter[int] | None = None) -> None:
        self.stream, self.length, self.place = stream, lengths[stream], 0
        self.counts = counts

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.place == self.length:
            raise StopIteration
        if self.counts is not None:
            self.counts[self.stream] += 1
        self.place += 1
        return sample(self.stream, self.place - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def forgetful(stream: int, of: int) -> Iterator[Any]:
    """The same from an iterator that says nothing of where it is."""
    yield from Lines(stream)


def keeping(stream: int, of: int) -> Lines:
    return Lines(stream)


class Divided(IterableDataset[Any]):
    """Divides itself as for the processes of a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        assert info.num_workers == MICROBATCHES
        for place in range(LENGTHS[info.id]):
            assert get_worker_info() is not None
            yield sample(info.id, place)


def noted(samples: list[Any]) -> Any:
    """Makes a microbatch, and notes what is in it."""
    seen.extend(divmod(number, 1000) for _, _, number in samples)
    return default_collate(samples)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.table = nn.Embedding(3, 9)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.dropout(F.relu(self.norm(self.first(x)) + self.table(x.argmax(1) % 3))))
        return found


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets, _ = batch
    if len(inputs) == 1 and model.training:  # BatchNorm wants two
        inputs, targets = inputs.repeat(2, 1), targets.repeat(2)
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)


def make(collective: Any = None, callbacks: Sequence[unisono.Callback] = (), **settings: Any) -> Trainer:
    torch.manual_seed(5)
    model = Net()
    defaults: dict[str, Any] = {"batch_size": BATCH, "microbatches": MICROBATCHES, "sync": unisono.Exact(replicate_kib=0)}
    defaults["loader"] = unisono.Loader(collate_fn=noted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, optimizer, loss, collective=collective, callbacks=callbacks, **{**defaults, **settings})


def outcome(trainer: Trainer) -> dict[str, str]:
    state = {name: digest(value) for name, value in trainer.model.state_dict().items()}
    return {**state, "samples": str(trainer.position.samples), "steps": str(trainer.position.step)}


def fit(
    workers: Any, data: Any, callbacks: Sequence[unisono.Callback] = (), *, fitting: dict[str, Any] | None = None, **settings: Any
) -> dict[str, str]:
    trainer = make(workers, callbacks, **settings)
    trainer.fit(data, **(fitting or {"epochs": EPOCHS}))
    return outcome(trainer)


def alone(data: Any, **settings: Any) -> dict[str, str]:
    return fit(None, data, **settings)


DATA: dict[str, Callable[[], Any]] = {
    "keeps its state": lambda: Streams(keeping),
    "keeps none": lambda: Streams(forgetful),
    "divides itself": Divided,
    "shuffled": lambda: Streams(keeping, shuffle=4),
}
every_kind = pytest.mark.parametrize("data", DATA.values(), ids=DATA)
WHOLE = [(stream, place) for stream, length in enumerate(LENGTHS) for place in range(length)]


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    seen.clear()
    yield
    empty_memory()


# ---- one model for every number of workers ----


@every_kind
def test_the_model_is_the_same_for_every_number_of_workers(data: Callable[[], Any]) -> None:
    expected = alone(data())
    assert expected["samples"] == str(EPOCHS * len(WHOLE))
    assert sorted(seen) == sorted(WHOLE * EPOCHS)
    for workers in (2, 3, 5):
        for found in run_threads(workers, lambda collective: fit(collective, data())):
            assert found == expected, f"{workers} workers"


@every_kind
def test_a_run_that_stops_goes_on_with_another_number_of_workers(data: Callable[[], Any]) -> None:
    expected = alone(data())
    for stop, every, first, second in ((4, 1, 2, 3), (5, 3, 1, 2), (8, 1, 3, 1), (11, 2, 5, 2)):
        part = partial(fit, data=data(), run_dir=memory_url(), checkpoint_every=every)
        with pytest.raises(Killed):
            run_threads(first, partial(part, callbacks=[Dies(stop)]))
        for found in run_threads(second, part):
            assert found == expected, f"stopped on {first} after step {stop}, resumed on {second}"


@pytest.mark.parametrize("kind", ["keeps none", "shuffled"])
def test_workers_die_and_others_come(kind: str) -> None:
    data = DATA[kind]
    expected = alone(data())
    for call, told in ((9, False), (20, True), (33, False), (47, True)):
        lives = run_lives(3, lambda link: fit(link, data()), {1: Death(call, told)}, joiners=1)
        for rank, found in lives.results.items():
            if rank >= 3 and lives.calls[rank] <= 10:
                continue  # it came when all was done
            assert found == expected, f"worker {rank}, when 1 died at call {call}, told: {told}"


class Moves(Callback):
    """After each step all workers have other microbatches."""

    RANGES = (((0, 1), (1, 3), (3, 5)), ((0, 3), (3, 4), (4, 5)), ((0, 2), (2, 3), (3, 5)))
    edits_weights = False

    def on_step(self, trainer: Trainer, result: unisono.StepResult) -> None:
        ranges = self.RANGES[result.step % 3]
        trainer._session.group.balance.ranges = ranges
        assert trainer._loop._feed is not None
        trainer._loop._feed.reassign(ranges)


@every_kind
def test_microbatches_move_between_workers(data: Callable[[], Any]) -> None:
    expected = alone(data())
    for found in run_threads(3, lambda collective: fit(collective, data(), [Moves()])):
        assert found == expected


def test_microbatches_stay_where_another_worker_would_have_to_read_everything_again() -> None:
    for data, moves in ((DATA["keeps its state"](), True), (DATA["keeps none"](), False)):
        can_move: list[bool] = []

        class Asks(Callback):
            edits_weights = False

            def on_step(self, trainer: Trainer, result: unisono.StepResult, found: list[bool] = can_move) -> None:
                if result.step == 5:
                    assert trainer._loop._feed is not None
                    found.append(trainer._loop._feed.can_move)

        run_threads(2, partial(fit, data=data, callbacks=[Asks()]))
        assert can_move == [moves, moves]


def test_loader_processes_give_the_same_samples() -> None:
    expected = alone(DATA["keeps its state"]())
    for workers in (1, 2):
        loader = unisono.Loader(collate_fn=noted, num_workers=2)
        for found in run_threads(workers, partial(fit, data=DATA["keeps its state"](), loader=loader)):
            assert found == expected, f"{workers} workers"


def test_a_loop_of_ones_own_leaves_in_the_middle_and_goes_on() -> None:
    def work(collective: Any, *, leaves: int) -> dict[str, str]:
        trainer = make(collective, run_dir=run_dir)
        for batch in trainer.batches(Streams(keeping), epochs=EPOCHS):
            if trainer.position.step == leaves:
                trainer.save()
                break
            trainer.step(batch)
        return outcome(trainer)

    run_dir = memory_url()
    expected = alone(Streams(keeping))
    run_threads(2, partial(work, leaves=5))
    assert run_threads(3, partial(work, leaves=99)) == [expected] * 3


def test_a_state_of_one_data_set_is_not_given_to_another() -> None:
    counts: collections.Counter[int] = collections.Counter()
    trainer = make()
    trainer.fit(Streams(lambda stream, of: Lines(stream, [60] * 5)), steps=10)
    trainer.fit(Streams(lambda stream, of: Lines(4 - stream, [60] * 5, counts)), steps=12)
    assert min(counts.values()) > 20  # as many as were trained of the other


# ---- every sample weighs the same ----


def test_short_batches_weigh_exactly() -> None:
    """As a plain loop over whole batches: sums over the samples, divided by their number."""

    def linear() -> nn.Linear:
        torch.manual_seed(2)
        return nn.Linear(6, 3).double()

    def summed(model: Any, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch[0].double()), batch[1], reduction="sum"), len(batch[1])

    def work(collective: Any) -> Tensor:
        model = linear()
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.5),
            summed,
            batch_size=BATCH,
            microbatches=MICROBATCHES,
            collective=collective,
        )
        trainer.fit(Streams(plain), epochs=1)
        return model.weight.detach().clone()

    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    streams = [list(plain(stream, MICROBATCHES)) for stream in range(MICROBATCHES)]
    for batch in range(6):
        rows = [row for stream, size in zip(streams, (3, 3, 3, 2, 2), strict=True) for row in stream[batch * size :][:size]]
        inputs, targets = torch.stack([row[0] for row in rows]).double(), torch.tensor([row[1] for row in rows])
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    for workers in (1, 2, 3, 5):
        for weight in run_threads(workers, work):
            assert torch.allclose(weight, model.weight, rtol=0, atol=1e-12)


def plain(stream: int, of: int) -> Iterator[Any]:
    """Without anything drawn."""
    generator = torch.Generator().manual_seed(stream)
    for place in range(LENGTHS[stream]):
        yield torch.randn(6, generator=generator), place % 3


def test_drop_last_ends_the_epoch_with_the_first_stream_that_ends() -> None:
    fitting = {"epochs": EPOCHS, "drop_last": True}
    expected = alone(Streams(keeping), fitting=fitting)
    assert (expected["steps"], expected["samples"]) == (str(EPOCHS), str(EPOCHS * BATCH))  # stream 4 has three samples
    assert run_threads(3, partial(fit, data=Streams(keeping), fitting=fitting)) == [expected] * 3


def test_a_microbatch_may_have_several_streams_which_take_turns() -> None:
    lengths = [5, 3, 6, 2, 4, 1, 7, 3, 2, 6]
    data = partial(Streams, lambda stream, of: Lines(stream, lengths), count=10)
    expected = alone(data(), fitting={"epochs": 1})
    assert sorted(seen) == [(stream, place) for stream, length in enumerate(lengths) for place in range(length)]
    assert seen[:3] == [(0, 0), (5, 0), (0, 1)]
    run_dir = memory_url()
    with pytest.raises(Killed):
        run_threads(3, partial(fit, data=data(), callbacks=[Dies(2)], run_dir=run_dir, checkpoint_every=1, fitting={"epochs": 1}))
    assert run_threads(2, partial(fit, data=data(), run_dir=run_dir, fitting={"epochs": 1})) == [expected] * 2


def test_shuffle_mixes_blocks_and_each_epoch_anew() -> None:
    alone(Streams(lambda stream, of: Lines(stream, [40] * 5), shuffle=10))
    per_stream = [[place for stream, place in seen if stream == number] for number in range(5)]
    for places in per_stream:
        assert [sorted(places[at : at + 10]) for at in range(0, 40, 10)] == [list(range(at, at + 10)) for at in range(0, 40, 10)]
        assert places[:10] != sorted(places[:10])
        assert places[:40] != places[40:]
    assert len({tuple(places) for places in per_stream}) == 5


# ---- resumed at once, or read forward ----


def test_a_stream_that_keeps_its_state_is_not_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    for opens, reads_again in ((Lines, False), (lambda *given: iter(list_of(Lines(*given))), True)):
        counts: collections.Counter[int] = collections.Counter()
        streams = Streams(lambda stream, of, counts=counts, opens=opens: opens(stream, [60] * 5, counts))  # type: ignore[misc]
        settings: dict[str, Any] = {"data": streams, "run_dir": memory_url(), "checkpoint_every": 1, "fitting": {"epochs": 1}}
        with pytest.raises(Killed):
            run_threads(2, partial(fit, callbacks=[Dies(18)], **settings))
        capsys.readouterr()
        counts.clear()
        run_threads(3, partial(fit, **settings))
        said = capsys.readouterr().out
        read = counts[0] - 4  # by the look at how it begins
        assert (read > 40) == reads_again, f"{read} of 60 samples, 54 of which had been trained"
        assert bool(re.search(r"read forward over 1[678] batches in", said)) == reads_again


def list_of(lines: Lines) -> Iterator[Any]:
    yield from lines


def test_what_is_kept_of_streams_without_end_does_not_grow() -> None:
    plan = StreamPlan(streams=Streams(lambda stream, of: Endless()), batch_size=8, microbatches=2, drop_last=False, seed=0)
    lane, positions = Lane(plan, 0, 0), Positions()
    for number in range(3000):
        part = lane.take()
        assert len(part.samples) == 4
        positions.note(0, 0, number, part.start or {"made up": number})
    assert len(positions._known[0]) <= 2 + (3000).bit_length()
    assert len(lane._marks) <= 2
    assert len(lane._ahead) == 1
    # Wherever a step has to be taken again, the way there is short.
    for number in (0, 1500, 2900, 2999):
        at, _ = positions.before(0, 0, number)
        assert number - at <= max(1, 2999 - number) + 1 or at == 0


class Endless:
    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.place += 1
            yield self.place - 1

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_a_place_far_inside_a_stream_is_reached_at_once() -> None:
    plan = StreamPlan(
        streams=Streams(lambda stream, of: Endless(), shuffle=100), batch_size=8, microbatches=2, drop_last=False, seed=0
    )
    number, far = 125_000_000, 10**9 // 2
    block = {"block": far // 100, "given": far % 100, "stream": {"position": far // 100 * 100, "state": {"place": far}}}
    start = {"given": [far], "turn": 0, "ended": [False], "streams": [block]}
    began = time.monotonic()
    part = Lane(plan, 0, 0, number, start).take()
    assert time.monotonic() - began < 5
    assert all(far <= sample < far + 200 for sample in part.samples)
    assert part.numbers.tolist() == [(far + place) * 2 for place in range(4)]


# ---- what cannot work is refused, with the reason ----


class Everything(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (sample(0, place) for place in range(20))


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "alike": (Everything, {}, ConfigurationError, "streams 0 and 1 of 5 begin with the same samples.*get_worker_info"),
    "ends at once": (
        lambda: Streams(lambda stream, of: Lines(stream, [5, 5, 5, 0, 5])),
        {},
        DataError,
        "stream 3 of 5 ended at once. Each of the 5 streams needs samples: .*as many files",
    ),
    "too short for drop_last": (
        lambda: Streams(lambda stream, of: Lines(stream, [5, 5, 2, 5, 5])),
        {"drop_last": True},
        DataError,
        "stream 2 of 5 gave 2 samples, fewer than",
    ),
    "an order": (lambda: Streams(keeping), {"order": [1, 2]}, ConfigurationError, r"unisono.Streams\(open, shuffle="),
    "a count": (lambda: Streams(keeping, count=7), {}, ConfigurationError, "count=7 streams cannot be shared evenly by 5"),
    "an error": (
        lambda: Streams(lambda stream, of: fails(stream)),
        {},
        DataError,
        "stream 2 of 5, after 7 samples: the next sample could not be read: ValueError: no such line",
    ),
    "an error at the beginning": (
        lambda: Streams(lambda stream, of: Lines(stream + 1)),
        {},
        DataError,
        r"stream 4 of 5 cannot be read: IndexError",
    ),
    "a state that cannot be saved": (
        lambda: Streams(lambda stream, of: Odd(stream)),
        {},
        DataError,
        r"state_dict\(\) of a stream \(Odd\) cannot be saved",
    ),
}


def fails(stream: int) -> Iterator[Any]:
    yield from (sample(stream, place) for place in range(7))
    if stream == 2:
        raise ValueError("no such line")


class Odd(Lines):
    def state_dict(self) -> dict[str, Any]:
        return {"file": self}


@pytest.mark.parametrize(("data", "fitting", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("workers", [1, 3])
def test_what_cannot_work_is_refused(
    workers: int, data: Callable[[], Any], fitting: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        run_threads(workers, lambda collective: fit(collective, data(), fitting={"epochs": 1, **fitting}))


@pytest.mark.parametrize("given", [{"open": 3}, {"open": keeping, "count": 0}, {"open": keeping, "shuffle": -1}])
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Streams(**given)


def test_other_data_than_those_in_which_a_run_stopped_are_refused() -> None:
    run_dir = memory_url()
    with pytest.raises(Killed):
        run_threads(2, partial(fit, data=Streams(keeping), callbacks=[Dies(3)], run_dir=run_dir, checkpoint_every=1))
    other = Streams(lambda stream, of: Lines((stream + 1) % of))
    with pytest.raises(ConfigurationError, match="samples of the data set are not what they were"):
        run_threads(3, partial(fit, data=other, run_dir=run_dir))
    with pytest.raises(ConfigurationError, match="in the middle of epoch 1 on other data"):
        run_threads(3, partial(fit, data=Streams(keeping, shuffle=3), run_dir=run_dir))


def test_the_streams_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    code = re.search(r"### Streams.*?```python\n(.*?)```", guide, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(7):
        with gzip.open(f"texts/{number}.gz", "wt") as file:
            file.writelines(f"{place}\n" for place in range(number * 1000, number * 1000 + LENGTHS[number % 5]))
    names: dict[str, Any] = {"gzip": gzip, "pathlib": pathlib, "unisono": unisono}
    names["encode"] = lambda line: sample(*divmod(int(line), 1000))
    exec(code[1], names)
    expected = alone(names["streams"])
    assert len(seen) == EPOCHS * (len(WHOLE) + LENGTHS[0] + LENGTHS[1])
    run_dir = str(tmp_path / "run")
    with pytest.raises(Killed):
        run_threads(2, partial(fit, data=names["streams"], callbacks=[Dies(5)], run_dir=run_dir, checkpoint_every=1))
    assert run_threads(3, partial(fit, data=names["streams"], run_dir=run_dir)) == [expected] * 3
