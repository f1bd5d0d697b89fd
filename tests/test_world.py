"""Who takes part, from each launcher's variables; and how many cores there are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unisono.errors import ConfigurationError
from unisono.world import World, expand_hosts, room_for_workers, usable_cores

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
FOUNDER = {
    **TORCHRUN,
    "UNISONO_LAUNCHED": "1",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "UNISONO_STORE": "node7:4711",
    "UNISONO_ATTEMPT": "2",
    "UNISONO_UID": "0.5",
    "UNISONO_FOUNDERS": "0.4,0.5,0.6,0.7",
    "UNISONO_MINIMUM": "3",
    "UNISONO_WAIT": "1.5",
    "UNISONO_TERMINAL": "7,8",
}
JOINER = {**{name: value for name, value in FOUNDER.items() if name != "UNISONO_FOUNDERS"}, "UNISONO_JOINS": "1"}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[003-004],gpu1",
    "SLURM_JOB_NODELIST": "other[1-9]",
}


def test_a_process_without_launcher_is_alone() -> None:
    world = World.from_environment({})
    assert world == World(host=socket.gethostname())
    assert (world.rank, world.size, world.local_rank, world.local_size, world.threads) == (0, 1, 0, 1, 1)
    assert (world.launcher, world.master_addr, world.master_port, world.init_method) == ("alone", None, None, None)
    assert world.is_main


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UNISONO_THREADS", "3")
    assert World.from_environment().threads == 3


def test_torchrun_is_understood() -> None:
    world = World.from_environment(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.launcher, world.init_method) == ("torchrun", "tcp://node7:29500")
    assert not world.is_main


def test_unisono_run_marks_itself() -> None:
    world = World.from_environment({**TORCHRUN, "UNISONO_LAUNCHED": "1", "UNISONO_WORKERS_DEFAULTED": "1"})
    assert (world.launcher, world.size_defaulted) == ("unisono run", True)
    assert not World.from_environment({**TORCHRUN, "UNISONO_WORKERS_DEFAULTED": "1"}).size_defaulted


def test_a_founder_knows_the_store_and_the_other_founders() -> None:
    world = World.from_environment(FOUNDER)
    assert (world.store, world.attempt, world.uid, world.joins) == ("node7:4711", 2, "0.5", False)
    assert world.founders == ("0.4", "0.5", "0.6", "0.7")
    assert (world.minimum, world.wait_s, world.terminal) == (3, 1.5, (7, 8))
    assert World.from_environment({**FOUNDER, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).founders == ("0.4", "0.5")


def test_a_worker_that_joins_later_has_no_founders_and_is_never_surplus() -> None:
    world = World.from_environment({**JOINER, "UNISONO_WORKERS_DEFAULTED": "1"})
    assert (world.joins, world.founders, world.uid, world.local_rank) == (True, (), "0.5", 1)
    assert world.at_most(1) is world


def test_without_a_store_or_under_another_launcher_nobody_can_join() -> None:
    for gone in ("UNISONO_STORE", "UNISONO_LAUNCHED"):
        world = World.from_environment({name: value for name, value in FOUNDER.items() if name != gone})
        assert (world.store, world.attempt, world.uid, world.founders, world.joins) == (None, 0, "", (), False)
        assert (world.minimum, world.wait_s, world.terminal) == (1, 300.0, None)


def test_a_launcher_without_a_terminal_gives_none() -> None:
    assert World.from_environment({k: v for k, v in FOUNDER.items() if k != "UNISONO_TERMINAL"}).terminal is None


def test_slurm_is_understood() -> None:
    world = World.from_environment(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (4, 5, 0, 1)
    assert (world.launcher, world.master_addr, world.master_port) == ("slurm", "node003", 15000 + 123456 % 20000)


def test_slurm_takes_the_meeting_place_that_is_given() -> None:
    world = World.from_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert world.init_method == "tcp://10.0.0.1:4000"


def test_a_job_step_may_have_fewer_tasks_than_the_job() -> None:
    env = {**SLURM, "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "64"}
    assert World.from_environment(env).size == 5


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_or_interactive_shell_is_alone(step: str | None) -> None:
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert World.from_environment(env if step is None else {**env, "SLURM_STEP_ID": step}).launcher == "alone"


def test_torchrun_within_slurm_is_torchrun() -> None:
    assert World.from_environment({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        (TORCHRUN, {"RANK": None}, "RANK is not set"),
        (TORCHRUN, {"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (TORCHRUN, {"MASTER_PORT": "none"}, "MASTER_PORT='none'"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        (TORCHRUN, {"RANK": "8"}, "RANK=8 contradicts WORLD_SIZE=8"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (TORCHRUN, {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 contradicts LOCAL_WORLD_SIZE=4"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
        (TORCHRUN, {"UNISONO_THREADS": "two"}, "UNISONO_THREADS='two'"),
        (TORCHRUN, {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0'"),
        (FOUNDER, {"UNISONO_UID": None}, "UNISONO_UID is not set"),
        (FOUNDER, {"UNISONO_FOUNDERS": None}, "UNISONO_FOUNDERS is not set"),
        (FOUNDER, {"UNISONO_FOUNDERS": "0.4,0.5"}, "UNISONO_FOUNDERS=0.4,0.5 contradicts RANK=1, WORLD_SIZE=4"),
        (FOUNDER, {"RANK": "2"}, "contradicts RANK=2"),
        (FOUNDER, {"UNISONO_ATTEMPT": "x"}, "UNISONO_ATTEMPT='x'"),
        (FOUNDER, {"UNISONO_MINIMUM": "0"}, "UNISONO_MINIMUM='0'"),
        (FOUNDER, {"UNISONO_WAIT": "long"}, "UNISONO_WAIT='long'"),
        (FOUNDER, {"UNISONO_TERMINAL": "1"}, "UNISONO_TERMINAL='1'"),
        (SLURM, {"SLURM_PROCID": "5"}, "SLURM_PROCID=5 contradicts"),
        (SLURM, {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1 contradicts"),
        (SLURM, {"SLURM_NODEID": "3"}, "SLURM_NODEID=3"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2(3)"}, "SLURM_STEP_TASKS_PER_NODE='2(3)'"),
        (SLURM, {"SLURM_STEP_NODELIST": "node[1"}, "not a Slurm node list"),
        (SLURM, {"SLURM_STEP_NODELIST": "node[a-b]"}, "'a-b'"),
    ],
)
def test_wrong_variables_are_named(base: dict[str, str], change: dict[str, str | None], words: str) -> None:
    env = {key: value for key, value in {**base, **change}.items() if value is not None}
    with pytest.raises(ConfigurationError) as caught:
        World.from_environment(env)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({"UNISONO_THREADS": "2", "OMP_NUM_THREADS": "8"}, 2),
        ({"OMP_NUM_THREADS": "8"}, 8),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": ""}, 1),
    ],
)
def test_threads_come_from_the_most_specific_variable(env: dict[str, str], threads: int) -> None:
    assert World.from_environment(env).threads == threads


def test_too_many_workers_that_were_asked_for_are_an_error() -> None:
    world = World(rank=0, size=4, local_size=4)
    assert world.at_most(4) is world
    with pytest.raises(ConfigurationError, match="4 workers but only 3 microbatches"):
        world.at_most(3)
    with pytest.raises(ConfigurationError, match="4 workers but only 3 microbatches"):
        World(rank=3, size=4, local_size=4, size_defaulted=True, minimum=4).at_most(3)


def test_workers_that_nobody_asked_for_leave() -> None:
    worlds = [World(rank=rank, size=4, local_rank=rank, local_size=4, size_defaulted=True) for rank in range(4)]
    assert [(w.size, w.local_size) for w in (world.at_most(2) for world in worlds[:2])] == [(2, 2), (2, 2)]
    assert World(size=3, local_size=3, founders=("0.0", "0.1", "0.2"), size_defaulted=True).at_most(2).founders == ("0.0", "0.1")
    for world in worlds[2:]:
        with pytest.raises(SystemExit) as left:
            world.at_most(2)
        assert left.value.code == 0


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[001-003,7],gpu3", ["node001", "node002", "node003", "node7", "gpu3"]),
        ("rack[1-2]-node[09-10]", ["rack1-node09", "rack1-node10", "rack2-node09", "rack2-node10"]),
        ("a,b-[8-11]x", ["a", "b-8x", "b-9x", "b-10x", "b-11x"]),
    ],
)
def test_node_lists_are_expanded(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_each_gpu_has_room_for_a_worker_and_without_gpus_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert room_for_workers(1, tmp_path) == usable_cores(tmp_path)
    assert room_for_workers(10**6, tmp_path) == 1
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert room_for_workers(1, tmp_path) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # they are hidden, or PyTorch cannot use them
    assert room_for_workers(1, tmp_path) == usable_cores(tmp_path)


def test_usable_cores_obey_quota_and_affinity(tmp_path: Path) -> None:
    quota = "sys/fs/cgroup/cpu.max"
    assert usable_cores(write(tmp_path, {"proc/self/cgroup": "0::/"})) == len(os.sched_getaffinity(0))
    assert usable_cores(write(tmp_path, {quota: "10000 100000"})) == 1
    assert usable_cores(write(tmp_path, {quota: "100000000 100000"})) == len(os.sched_getaffinity(0))


def test_two_tasks_of_srun_meet(tmp_path: Path) -> None:
    script = """
import sys, torch, torch.distributed as dist
from unisono.world import World
world = World.from_environment()
assert world.launcher == "slurm"
dist.init_process_group("gloo", init_method=world.init_method, rank=world.rank, world_size=world.size)
total = torch.tensor([world.rank + 1])
dist.all_reduce(total)
print(world.rank, world.size, world.local_size, total.item())
dist.barrier()
dist.destroy_process_group()
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **SLURM, **common, "MASTER_PORT": str(port), "SLURM_PROCID": n, "SLURM_LOCALID": n},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in ("0", "1")
    ]
    try:
        assert [task.communicate(timeout=60)[0] for task in tasks] == ["0 2 2 3\n", "1 2 2 3\n"]
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
