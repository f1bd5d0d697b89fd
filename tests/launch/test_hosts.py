"""`unisono run --meet` on several hosts: they meet, later ones join, and one that is lost ends nobody else's work."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.virtual_hosts import NoNamespaces, VirtualHosts, address, virtual_hosts
from tests.launch.conftest import PRELUDE, Launch, Launcher, assert_gone
from tests.launch.test_supervisor import ELASTIC


@pytest.fixture
def place() -> str:
    """An address that nobody else uses now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def hosts() -> Iterator[VirtualHosts]:
    try:
        with virtual_hosts() as hosts:
            yield hosts
    except NoNamespaces as reason:
        pytest.skip(str(reason))


class Site:
    """The same command, on one host after another."""

    def __init__(self, launcher: Launcher, body: str, place: str, *options: str) -> None:
        self._launcher = launcher
        self._script = str(launcher.write(ELASTIC + textwrap.dedent(body)))
        self._options = ("--meet", place, "--wait", "30", *options)

    def start(self, through: Callable[[list[str]], list[str]] = list) -> Launch:
        command = ["-m", "unisono.launch", "run", "--workers", "1", *self._options, self._script]
        return self._launcher.command(*command, through=through)

    def start_plain(self) -> Launch:
        """Without what tells that the workers can go on without each other."""
        Path(self._script).write_text(PRELUDE + "tell('there'); signal.pause()")
        return self.start()


def hear(launch: Launch) -> tuple[str, int]:
    *words, pid = launch.hear()
    launch.know([int(pid)])
    return " ".join(words), int(pid)


def test_hosts_begin_together_and_their_workers_can_talk(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        import torch
        dist.init_process_group("gloo", init_method=world.init_method, rank=world.rank, world_size=world.size)
        total = torch.tensor([world.rank + 1])
        dist.all_reduce(total)
        tell(rank, size, world.local_rank, world.local_size, total.item(), world.founders)
        dist.barrier()
        dist.destroy_process_group()
        store.set("over", "1")
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(), site.start()]
    assert {hear(launch)[0] for launch in launches} == {"founder 0 0.0", "founder 0 1.0"}
    told = sorted(launch.hear() for launch in launches)
    assert told == [[str(rank), "2", "0", "1", "3", "('0.0',", "'1.0')"] for rank in range(2)]
    for launch in launches:
        status, out, err = launch.finish()
        assert (status, out, err) == (0, "", "")


def test_a_host_that_comes_later_joins_and_a_host_may_leave(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        if world.joins:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if store.check(["stop"]) else 0))
            store.set("joined", world.uid)
            tell("joined")
            signal.pause()
        until("joined")
        until("dead/" + store.get("joined").decode())
        store.set("over", "1")
        """,
        place,
    )
    first = site.start()
    assert hear(first)[0] == "founder 0 0.0"
    second = site.start()
    assert hear(second)[0] == "joiner 0 1.0"
    assert second.hear() == ["joined"]
    second.process.terminate()
    assert second.finish()[0] == 0
    assert first.finish()[0] == 0


def test_a_host_that_comes_to_a_script_without_a_trainer_says_so(launcher: Launcher, place: str) -> None:
    first = Site(launcher, "signal.pause()", place).start_plain()
    assert first.hear() == ["there"]
    status, _, err = Site(launcher, "", place, "--wait", "0.5").start_plain().finish()
    assert status == 1
    assert f"the run at {place} has not made a Trainer within 0.5 s (--wait)" in err


def test_a_worker_is_replaced_on_its_own_host_and_a_restart_of_all_takes_every_host(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        if world.attempt == 0 and not world.joins:
            if world.uid == "1.0":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        if world.attempt == 0:
            os._exit(79)
        store.set("over", "1")
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(), site.start()]
    heard = [[hear(launch)[0]] for launch in launches]
    second = heard.index(["founder 0 1.0"])
    heard[second].append(hear(launches[second])[0])
    for own, launch in zip(heard, launches, strict=True):
        own.append(hear(launch)[0])
    assert sorted(heard) == [["founder 0 0.0", "founder 1 0.1"], ["founder 0 1.0", "joiner 0 1.1", "founder 1 1.2"]]
    assert [launch.finish()[0] for launch in launches] == [0, 0]


def test_a_host_that_joined_and_began_again_with_the_others_may_leave(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        if world.attempt == 0:
            if world.joins:
                os._exit(79)
            signal.pause()
        if rank == 0:
            until("dead/" + world.founders[1])
            store.set("over", "1")
        else:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            tell("there")
            signal.pause()
        """,
        place,
    )
    first = site.start()
    assert hear(first)[0] == "founder 0 0.0"
    second = site.start()
    assert [hear(second)[0], hear(second)[0]] == ["joiner 0 1.0", "founder 1 1.1"]  # with another rank than before
    assert hear(first)[0] == "founder 1 0.1"
    assert second.hear() == ["there"]
    second.process.terminate()
    assert [launch.finish()[0] for launch in (second, first)] == [0, 0]


def test_a_worker_that_those_of_other_hosts_have_given_up_is_killed_and_replaced(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        if world.uid == "1.0":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif not world.joins:
            store.set("outside/1.0", "1")
            until("dead/1.0", "over")
        else:
            store.set("over", "1")
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(), site.start()]
    heard = [hear(launch)[0] for launch in launches]
    assert hear(launches[heard.index("founder 0 1.0")])[0] == "joiner 0 1.1"
    assert [launch.finish()[0] for launch in launches] == [0, 0]


def test_members_that_stand_still_on_another_host_than_those_who_wait_for_them_are_ended(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        from unisono.elastic.membership import Member, Membership, restarting
        from unisono.system.process import Process

        if world.uid == "1.0":
            store.set("members", '["1.0"]')
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.attempt == 0:
            mine = Membership(store, Member(uid=world.uid, host="", process=Process.this()), [], timeout_s=0.5)
            while True:
                with restarting():
                    mine.check_members()
                signal.sigtimedwait([signal.SIGUSR1], 0.01)
        store.set("over", "1")
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(), site.start()]
    heard = [hear(launch)[0] for launch in launches]
    assert hear(launches[heard.index("founder 0 0.0")])[0].startswith("founder 1 ")
    told = [launch.finish() for launch in launches]
    assert [status for status, _, _ in told] == [0, 0]
    assert sum("was killed by SIGKILL" in err for _, _, err in told) == 1


LEAVES = """
if world.uid == "0.0":
    store.set("members", '["1.0"]')
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit())
until("dead/0.0")
tell("alone")
while True:
    signal.pause()
"""
"""The worker of the host that serves the store leaves. The other one stops or, at SIGUSR1, comes to the end."""


def part(launcher: Launcher, place: str) -> tuple[Launch, Launch, int]:
    """The two launches, where the worker of the first one has left; and the process of the other worker."""
    site = Site(launcher, LEAVES, place, "--hosts", "2")
    launches = [site.start(), site.start()]
    heard = [hear(launch) for launch in launches]
    first = next(number for number, (name, _) in enumerate(heard) if name == "founder 0 0.0")
    assert launches[1 - first].hear() == ["alone"]
    return launches[first], launches[1 - first], heard[1 - first][1]


def test_a_host_whose_workers_have_left_says_so_if_the_others_do_not_finish_the_run(launcher: Launcher, place: str) -> None:
    first, second, _ = part(launcher, place)
    second.process.terminate()
    assert second.finish()[0] == 128 + signal.SIGTERM
    status, out, err = first.finish()
    assert (status, out) == (1, "")
    assert "the run is not finished" in err
    assert "this host's workers have left, and worker 1.0 ended with status 143. Start the same command again" in err


def test_a_host_whose_workers_have_left_succeeds_if_the_others_finish_the_run(launcher: Launcher, place: str) -> None:
    first, second, worker = part(launcher, place)
    os.kill(worker, signal.SIGUSR1)
    assert second.finish()[0] == 0
    assert first.finish() == (0, "", "")


def test_a_host_whose_workers_have_left_passes_a_stop_on_to_the_others(launcher: Launcher, place: str) -> None:
    first, second, _ = part(launcher, place)
    first.process.terminate()
    assert [launch.finish(limit_s=30.0)[0] for launch in (first, second)] == [128 + signal.SIGTERM] * 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_host_may_leave_however_its_workers_end_by_it(launcher: Launcher, place: str, signum: int) -> None:
    site = Site(
        launcher,
        f"""
        if world.uid == "1.0":  # it has not come to its Trainer, or is killed when it leaves
            if {signum} == signal.SIGKILL:
                signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            tell("there")
            signal.pause()
        until("dead/1.0")
        signal.sigtimedwait([signal.SIGUSR1], 1.0)  # long enough for what its launcher says to be heard
        store.set("over", "1")
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(), site.start()]
    names = [hear(launch)[0] for launch in launches]
    second = launches[names.index("founder 0 1.0")]
    assert second.hear() == ["there"]
    second.process.terminate()
    assert [launch.finish()[0] for launch in launches] == [0, 0]


def test_a_host_may_leave_while_the_hosts_meet_again(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        if world.attempt == 0:
            signal.signal(signal.SIGUSR1, lambda *_: sys.exit(79))  # all start again
            tell("there")
            while True:
                signal.pause()
        store.set("over", "1")
        """,
        place,
        "--hosts",
        "3",
    )
    launches = [site.start() for _ in range(3)]
    heard = [hear(launch) for launch in launches]
    assert [launch.hear() for launch in launches] == [["there"]] * 3
    (first, last), (second, worker), (third, _) = [
        next((launch, pid) for launch, (name, pid) in zip(launches, heard, strict=True) if name.endswith(f" {host}.0"))
        for host in range(3)
    ]
    third.process.send_signal(signal.SIGSTOP)  # the others wait for it
    workers = [psutil.Process(pid) for pid in (worker, last)]
    os.kill(worker, signal.SIGUSR1)
    assert_gone(workers)
    second.process.terminate()
    assert second.finish()[0] == 0
    third.process.send_signal(signal.SIGCONT)
    assert [launch.finish(limit_s=30.0)[0] for launch in (first, third)] == [0, 0]


def test_who_joins_where_all_founders_have_died_before_they_could_say_so_finds_it_out(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher,
        """
        from unisono.elastic.membership import Member, Membership, restarting
        from unisono.system.process import Process

        if world.attempt == 0:
            sys.exit(79)
        if world.attempt == 1 and not world.joins:
            os.kill(os.getpid(), signal.SIGKILL)
        mine = Membership(store, Member(uid=world.uid, host="", process=Process.this()), [], timeout_s=0.5)
        while world.joins:
            with restarting():
                mine.check_members()
            signal.sigtimedwait([signal.SIGUSR1], 0.01)
        store.set("over", "1")
        """,
        place,
    )
    launch = site.start()
    heard = [hear(launch)[0] for _ in range(4)]
    assert heard == ["founder 0 0.0", "founder 1 0.1", "joiner 1 0.2", "founder 2 0.3"]
    assert launch.finish()[0] == 0


def test_an_error_that_ends_the_run_ends_it_on_every_host(launcher: Launcher, place: str) -> None:
    site = Site(
        launcher, "if rank == 1 or world.joins:\n    raise ValueError('bad sample')\nsignal.pause()", place, "--hosts", "2"
    )
    launches = [site.start(), site.start()]
    for launch in launches:
        hear(launch)
    told = [launch.finish(limit_s=30.0) for launch in launches]
    assert [status for status, _, _ in told] == [1, 1]
    assert sorted("Traceback" in err for _, _, err in told) == [False, True]
    assert all("ValueError: bad sample" in err for _, _, err in told)


def test_without_the_host_of_the_store_the_others_end_and_say_what_to_do(launcher: Launcher, place: str) -> None:
    site = Site(launcher, "signal.pause()", place, "--hosts", "2")
    launches = [site.start(), site.start()]
    names = [hear(launch)[0] for launch in launches]
    first = names.index("founder 0 0.0")
    launches[first].process.kill()
    status, _, err = launches[1 - first].finish(limit_s=30.0)
    assert status == 1
    assert f"contact with the store at {place} was lost" in err
    assert "Traceback" not in err


def test_hosts_that_do_not_come_are_named(launcher: Launcher, place: str) -> None:
    site = Site(launcher, "", place, "--hosts", "2", "--wait", "0.5")
    status, _, err = site.start().finish()
    assert status == 1
    assert "1 of 2 hosts came within 0.5 s (--wait)" in err
    elsewhere = Site(launcher, "", "192.0.2.1:29400", "--wait", "0.5")  # an address for documentation, which nobody has
    status, _, err = elsewhere.start().finish()
    assert status == 1
    assert "no host serves the run at 192.0.2.1:29400 after 0.5 s" in err


def test_hosts_that_wait_for_others_can_be_stopped(launcher: Launcher, place: str) -> None:
    launch = Site(launcher, "", place, "--hosts", "2").start()
    host, port = place.split(":")
    while launch.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            break
    launch.process.send_signal(signal.SIGINT)
    status, out, err = launch.finish(limit_s=20.0)
    assert (status, out, err) == (128 + signal.SIGINT, "", "")


def test_an_address_that_cannot_be_used_is_named(launcher: Launcher) -> None:
    status, _, err = Site(launcher, "", "no-such-host.invalid:29400").start().finish()
    assert status == 2
    assert "this host cannot resolve 'no-such-host.invalid'" in err


def test_a_host_out_of_reach_ends_with_a_clear_error_and_the_other_goes_on(launcher: Launcher, hosts: VirtualHosts) -> None:
    place = f"{address(0)}:29400"
    site = Site(
        launcher,
        """
        if rank == 0:
            until("alone")
            store.set("over", "1")
        else:
            tell(os.environ["GLOO_SOCKET_IFNAME"])
            signal.pause()
        """,
        place,
        "--hosts",
        "2",
    )
    launches = [site.start(functools.partial(hosts.command, number)) for number in range(2)]
    for launch in launches:
        hear(launch)
    assert launches[1].hear() == ["wire"]
    hosts.run(0, "ip", "link", "set", "wire", "down")
    status, _, err = launches[1].finish(limit_s=40.0)
    assert status == 1
    assert f"contact with the store at {place} was lost (no answer for 10 s)" in err
    assert launches[0].process.poll() is None
    os.kill(launches[0].process.pid, signal.SIGTERM)
    assert launches[0].finish(limit_s=30.0)[0] == 128 + signal.SIGTERM
