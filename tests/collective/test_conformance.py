"""One suite over every collective: whatever carries the bytes, the same calls must give the same answers.

Threads run each check in a world of its own. Processes are slow to start, so each world of processes runs all checks, one
after the other, and the tests look at what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unisono.collective import Collective, Expected, InProcess
from unisono.errors import WorkerFailure
from unisono.layout import ALIGNMENT_BYTES
from unisono.testing import run_threads
from unisono.testing.processes import Transport

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.uint8, torch.int64)

Check = Callable[[Collective], None]
CHECKS: dict[str, Check] = {}


def check(work: Check) -> Check:
    CHECKS[work.__name__] = work
    return work


def expected(tensor: Tensor) -> Expected:
    return tensor.numel(), tensor.dtype, tensor.device


def message(sender: int, receiver: int, number: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What nobody else sends to anybody else: so a message that goes astray is seen."""
    return (torch.arange(numel) + 100 * sender + 10 * receiver + number).remainder(251).to(dtype)


def same(received: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(received) == len(wanted) and all(map(torch.equal, received, wanted))


def exchanged(collective: Collective, make: Callable[[int, int], list[Tensor]], name: str = "exchange") -> bool:
    """Whether everyone's ``make(sender, receiver)`` arrives."""
    me, everybody = collective.rank, range(collective.size)
    received = collective.exchange(
        [make(me, peer) for peer in everybody], [list(map(expected, make(peer, me))) for peer in everybody], name=name
    )
    return all(same(received[peer], make(peer, me)) for peer in everybody)


# ---- the checks: each runs on every worker ----


@check
def tensors_of_any_size_and_number_arrive_in_order(collective: Collective) -> None:
    assert exchanged(collective, lambda sender, receiver: [message(sender, receiver, n, 1 + sender + n) for n in range(3)])
    assert exchanged(collective, lambda sender, receiver: [message(sender, receiver, n, 5) for n in range(receiver)])


@check
def nothing_to_send_is_an_empty_list_or_an_empty_tensor(collective: Collective) -> None:
    assert exchanged(collective, lambda sender, receiver: [])
    assert exchanged(collective, lambda sender, receiver: [torch.empty(0)])
    assert exchanged(collective, lambda sender, receiver: [message(sender, receiver, 0, 4)] if sender == 0 else [])
    assert exchanged(
        collective, lambda sender, receiver: [torch.empty(0), message(sender, receiver, 1, 3), torch.empty(0, dtype=torch.int64)]
    )


@check
def exchanges_may_be_waited_for_in_any_order_from_memory_never_seen_before(collective: Collective) -> None:
    everybody = range(collective.size)

    memory = collective.allocate(150_000, torch.float32, CPU)
    for number in range(3):
        memory[50_000 * number : 50_000 * (number + 1)].copy_(message(collective.rank, 0, number, 50_000))
    wanted = [[(50_000, torch.float32, CPU), (70_000, torch.float32, CPU)] for _ in everybody]
    private = [message(collective.rank, 0, 9, 70_000) for _ in range(3)]
    pending = [
        collective.start_exchange([[part, private[number]] for _ in everybody], wanted, name=f"number {number}")
        for number, part in enumerate(memory.split(50_000))
    ]
    for number in (2, 0, 1):
        for peer, received in enumerate(pending[number].wait()):
            assert same(received, [message(peer, 0, number, 50_000), message(peer, 0, 9, 70_000)])
    collective.barrier()


@check
def every_dtype_arrives_as_it_was_sent(collective: Collective) -> None:
    assert exchanged(collective, lambda sender, receiver: [message(sender, receiver, 0, 9, dtype) for dtype in DTYPES])


@check
def large_messages_arrive_again_and_again(collective: Collective) -> None:
    for go in range(3):
        assert exchanged(collective, lambda sender, receiver, go=go: [message(sender, receiver, go, 50_000 + receiver)])


@check
def the_bits_of_a_nan_and_the_sign_of_zero_arrive(collective: Collective) -> None:
    strange = torch.tensor([-0.0, 0.0, float("nan"), -float("inf"), 1e-45]).view(torch.int32)
    strange[2] = 0x7FC0_1234  # a NaN with a payload
    received = collective.all_gather(strange.view(torch.float32))
    assert all(torch.equal(tensor.view(torch.int32), strange) for tensor in received)


@check
def exchanges_under_way_at_the_same_time_keep_apart(collective: Collective) -> None:
    me, everybody = collective.rank, range(collective.size)
    numel = 40_000  # large enough for memory that is kept and used again
    for go in range(2):
        pending = {
            name: collective.start_exchange(
                [[message(me, peer, number + go, numel)] for peer in everybody],
                [[(numel, torch.float32, CPU)] for _ in everybody],
                name=f"number {number}",
            )
            for number, name in enumerate(["a", "b", "c"])
        }
        received = {name: pending[name].wait() for name in ["c", "a", "b"]}
        for number, name in enumerate(["a", "b", "c"]):
            assert all(same(received[name][peer], [message(peer, me, number + go, numel)]) for peer in everybody)


@check
def what_a_worker_sends_to_itself_comes_back_as_it_is(collective: Collective) -> None:
    mine = torch.arange(4.0)
    received = collective.exchange([[mine]] * collective.size, [[expected(mine)]] * collective.size)
    assert received[collective.rank][0].data_ptr() == mine.data_ptr()


@check
def views_into_larger_memory_can_be_sent(collective: Collective) -> None:
    flat = torch.arange(48.0) + collective.rank
    received = collective.exchange(
        [[flat[16 * (peer % 3) : 16 * (peer % 3) + 16]] for peer in range(collective.size)],
        [[(16, torch.float32, CPU)]] * collective.size,
    )
    start = 16 * (collective.rank % 3)
    for peer in range(collective.size):
        assert torch.equal(received[peer][0], torch.arange(48.0)[start : start + 16] + peer)


@check
def received_memory_lasts_until_the_next_call(collective: Collective) -> None:
    """The contract: a sender leaves its memory alone until its first collective call after the wait."""
    numel = 30_000
    sent = collective.allocate(numel, torch.float32, CPU)
    for go in range(4):
        sent.fill_(10.0 * go + collective.rank)
        everywhere = [[(numel, torch.float32, CPU)]] * collective.size
        received = collective.exchange([[sent]] * collective.size, everywhere)
        total = sum(float(tensors[0].double().mean()) for tensors in received)
        assert total == sum(10.0 * go + peer for peer in range(collective.size))
        collective.barrier()


@check
def every_segment_is_published(collective: Collective) -> None:
    for sizes in ([3] * collective.size, [0] * (collective.size - 1) + [7], [7] + [0] * (collective.size - 1)):
        edges = [sum(sizes[:peer]) for peer in range(collective.size + 1)]
        flat = torch.full((edges[-1],), -1.0)
        flat[edges[collective.rank] : edges[collective.rank + 1]] = collective.rank
        collective.publish(flat, [(edges[peer], edges[peer + 1]) for peer in range(collective.size)])
        assert flat.tolist() == [float(peer) for peer in range(collective.size) for _ in range(sizes[peer])]


@check
def a_publisher_may_change_its_segment_at_once(collective: Collective) -> None:
    flat = torch.zeros(4 * collective.size)
    bounds = [(4 * peer, 4 * peer + 4) for peer in range(collective.size)]
    mine = slice(*bounds[collective.rank])
    for go in range(1, 4):
        flat[mine] = go * 10 + collective.rank
        collective.publish(flat, bounds)
        seen = flat.clone()
        flat[mine] = -1.0
        assert seen.tolist() == [float(go * 10 + peer) for peer in range(collective.size) for _ in range(4)]


@check
def any_worker_can_broadcast(collective: Collective) -> None:
    for source in range(collective.size):
        tensor = torch.full((2, 3), float(collective.rank))
        collective.broadcast(tensor, source)
        source_value = float(source)
        tensor += 1  # what one worker does with its copy does not reach the others
        assert tensor.eq(source_value + 1).all()


@check
def a_broadcast_comes_from_worker_0_unless_said_otherwise(collective: Collective) -> None:
    tensor = torch.tensor([collective.rank + 5])
    collective.broadcast(tensor)
    assert tensor.item() == 5


@check
def gathered_tensors_are_in_order_of_rank(collective: Collective) -> None:
    gathered = collective.all_gather(torch.tensor([collective.rank, 7]))
    assert [tensor.tolist() for tensor in gathered] == [[peer, 7] for peer in range(collective.size)]


@check
def byte_strings_of_any_length_are_gathered(collective: Collective) -> None:
    def words(rank: int) -> bytes:
        return bytes(range(256)) * rank  # worker 0 has nothing to say

    assert collective.all_gather_bytes(words(collective.rank)) == [words(peer) for peer in range(collective.size)]
    assert collective.all_gather_bytes(b"") == [b""] * collective.size
    told = collective.all_gather_json({"rank": collective.rank, "pair": (1.5, None)})
    assert told == [{"rank": peer, "pair": [1.5, None]} for peer in range(collective.size)]


@check
def several_tensors_of_each_worker_are_gathered(collective: Collective) -> None:
    def brought(rank: int) -> list[Tensor]:
        """Worker 0 brings nothing, and some of the others what is too large for a packet."""
        return [message(rank, 0, number, 3 + number * 9000 * (rank % 2)) for number in range(rank)]

    everybody = range(collective.size)
    for _ in range(2):
        gathered = collective.all_gather_lists(
            brought(collective.rank), [list(map(expected, brought(peer))) for peer in everybody]
        )
        assert all(same(gathered[peer], brought(peer)) for peer in everybody)


@check
def nobody_passes_a_barrier_before_everybody_is_there(collective: Collective) -> None:
    before = time.monotonic()  # one clock for all processes of a machine
    collective.barrier()
    after = time.monotonic()
    befores = [float(raw) for raw in collective.all_gather_bytes(repr(before).encode())]
    assert after >= max(befores)


@check
def bytes_to_other_workers_are_counted_and_no_others(collective: Collective) -> None:
    others = collective.size - 1

    def cost(call: Callable[[], Any]) -> int:
        before = collective.bytes_sent
        call()
        return collective.bytes_sent - before

    def everybodys_cost(call: Callable[[], Any]) -> int:
        """Of all workers together: one may pass on what another has sent."""
        return sum(int(text) for text in collective.all_gather_bytes(str(cost(call)).encode()))

    ten = torch.zeros(10, dtype=torch.float64)
    pairs = others * (others + 1)
    assert cost(lambda: collective.exchange([[ten, ten]] * (others + 1), [[expected(ten)] * 2] * (others + 1))) == 160 * others
    assert cost(lambda: collective.exchange([[]] * (others + 1), [[]] * (others + 1))) == 0
    assert everybodys_cost(lambda: collective.all_gather(torch.zeros(3))) == 12 * pairs
    assert everybodys_cost(lambda: collective.all_gather_bytes(b"12345")) == (8 + 5) * pairs
    flat = torch.zeros(6 * (others + 1))
    assert everybodys_cost(lambda: collective.publish(flat, [(6 * r, 6 * r + 6) for r in range(others + 1)])) == 24 * pairs
    assert everybodys_cost(lambda: collective.broadcast(ten)) == 80 * others


@check
def its_memory_is_aligned(collective: Collective) -> None:
    for numel in (1, 3, 100_001):
        memory = collective.allocate(numel, torch.float32, CPU)
        assert memory.shape == (numel,)
        assert memory.data_ptr() % ALIGNMENT_BYTES == 0


# ---- the worlds ----


def failed_checks(collective: Collective, size: int, transport: str) -> dict[str, str]:
    """Runs all checks; the names of those that failed, with their errors."""
    assert (collective.size, collective.rank in range(size), type(collective).__name__) == (size, True, transport)
    failed: dict[str, str] = {}
    for name, work in CHECKS.items():
        try:
            work(collective)
        except AssertionError as error:
            failed[name] = str(error) or "assertion failed"
    return failed


def end_by_an_error_on_the_last_worker(collective: Collective) -> None:
    if collective.rank == collective.size - 1:
        raise OSError("the data set is gone")
    collective.barrier()


WORLDS: list[tuple[Transport, str, int]] = [
    ("gloo", "TorchDistributed", 2),
    ("gloo", "TorchDistributed", 3),
    ("shared memory", "SharedMemory", 2),
    ("shared memory", "SharedMemory", 5),
]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]} {world[2]}")
def process_world(request: pytest.FixtureRequest, run_workers: Callable[..., Any]) -> tuple[int, list[dict[str, str]]]:
    transport, kind, size = request.param
    return size, run_workers(size, failed_checks, size, kind, transport=transport)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", list(CHECKS))
def test_threads(name: str, size: int) -> None:
    def work(collective: Collective) -> None:
        assert isinstance(collective, InProcess)
        assert collective.size == size
        CHECKS[name](collective)

    run_threads(size, work)


@pytest.mark.parametrize("name", list(CHECKS))
def test_processes(name: str, process_world: tuple[int, list[dict[str, str]]]) -> None:
    size, outcomes = process_world

    assert len(outcomes) == size
    assert [failed.get(name) for failed in outcomes] == [None] * size


def test_a_worker_alone_needs_no_meeting() -> None:
    collective = InProcess()

    assert failed_checks(collective, 1, "InProcess") == {}
    assert collective.bytes_sent == 0


# ---- failures ----


@pytest.mark.parametrize("size", [2, 5])
def test_when_a_thread_fails_its_own_error_comes_out_at_once(size: int) -> None:
    begin = time.monotonic()

    with pytest.raises(OSError, match="the data set is gone"):
        run_threads(size, end_by_an_error_on_the_last_worker)

    assert time.monotonic() - begin < 5


def test_the_threads_that_wait_for_a_failed_one_get_a_worker_failure_that_names_it() -> None:
    seen: list[WorkerFailure] = []

    def work(collective: Collective) -> None:
        if collective.rank == 1:
            raise OSError("the data set is gone")
        with pytest.raises(WorkerFailure, match="worker 1 ended") as caught:
            collective.barrier()
        seen.append(caught.value)

    with pytest.raises(OSError, match="the data set is gone"):
        run_threads(3, work)

    assert [failure.rank for failure in seen] == [1, 1]


def test_a_thread_that_has_returned_is_missed_by_those_that_still_wait() -> None:
    def work(collective: Collective) -> None:
        if collective.rank == 0:
            collective.barrier()

    with pytest.raises(WorkerFailure, match="worker 1 ended while worker 0 was waiting for it"):
        run_threads(2, work)


def test_threads_that_expect_something_else_say_so() -> None:
    def work(collective: Collective) -> None:
        collective.all_gather(torch.zeros(2 + collective.rank))

    with pytest.raises(WorkerFailure, match="the workers are not in the same step"):
        run_threads(2, work)


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
def test_when_a_process_fails_the_others_get_a_worker_failure_and_its_error_is_shown(
    transport: Transport, run_workers: Callable[..., Any]
) -> None:
    begin = time.monotonic()

    with pytest.raises(WorkerFailure) as caught:
        run_workers(2, end_by_an_error_on_the_last_worker, transport=transport)

    assert time.monotonic() - begin < 30, "without waiting for any time limit"
    text = str(caught.value)
    assert "OSError: the data set is gone" in text
    assert "LostWorker: worker 0 lost contact" in text
