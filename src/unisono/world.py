"""Rank and world size, read from a launcher's environment, or one process alone; and how many cores there are to use."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unisono.errors import ConfigurationError
from unisono.system.cgroups import cpu_quota

ALONE = "alone"
UNISONO_RUN = "unisono run"
TORCHRUN = "torchrun"
SLURM = "slurm"

# Slurm numbers its own steps from here up (batch script, interactive shell, extern, pending): they are no task of srun.
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0
_GPU_DEVICES = ("dev/nvidiactl", "dev/kfd", "dev/dxg")
"""One of them is there where PyTorch may find a GPU: NVIDIA's, AMD's, Windows' in WSL."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The workers of a run, as one of them sees it. *local*: it is made without talking to anyone."""

    rank: int = 0
    """Number of this worker, 0 to size - 1."""
    size: int = 1
    """How many workers there are."""
    local_rank: int = 0
    """Number of this worker among those of its host."""
    local_size: int = 1
    """How many workers this host has."""
    host: str = dataclasses.field(default_factory=socket.gethostname)
    """Name of this host."""
    threads: int = 1
    """Threads per worker for PyTorch's kernels. It is part of the fingerprint: the count changes bits."""
    launcher: str = ALONE
    """Who started the workers: "alone", "unisono run", "torchrun" or "slurm"."""
    master_addr: str | None = None
    """Host on which the workers meet; None when alone."""
    master_port: int | None = None
    """Port on which the workers meet; None when alone."""
    size_defaulted: bool = False
    """Whether the number of workers is a default of `unisono run`."""
    store: str | None = None
    """HOST:PORT of the store (a `torch.distributed.TCPStore`) through which `unisono run` and its workers coordinate membership;
    None under other launchers: then a worker that dies ends the run."""
    session: str | None = None
    """The kind of session that the launcher serves, as "module:class"; None: one whose workers stay the same."""
    attempt: int = 0
    """How often all workers have been restarted so far; keys of an attempt have the prefix "unisono/ATTEMPT" in the store."""
    uid: str = ""
    """Name of this process in the attempt, never used again: "0.3" is the fourth that host 0 has started."""
    founders: tuple[str, ...] = ()
    """Uids of the workers that the attempt starts with, in order of rank; empty for a worker that joins later."""
    joins: bool = False
    """Whether this worker was started later than the founders: its rank and size are those on its host."""
    minimum: int = 1
    """Smallest world size with which training goes on."""
    wait_s: float = 300.0
    """How long fewer workers than the minimum wait for more, in seconds."""
    terminal: tuple[int, int] | None = None
    """Descriptors of the launcher's standard output and error, for the worker that prints; None if it has none."""

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that speaks for all (rank 0)."""
        return self.rank == 0

    @property
    def init_method(self) -> str | None:
        """Where the workers meet, for `torch.distributed.init_process_group`; None when alone."""
        return None if self.master_addr is None else f"tcp://{self.master_addr}:{self.master_port}"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> World:
        """Read rank and world size from the variables of torchrun, `unisono run` or srun; without any: alone. *local*

        Args:
            env: The variables; None means those of this process. Nothing is changed.

        Raises:
            ConfigurationError: A variable is missing, not a number, or contradicts another one.
        """
        env = os.environ if env is None else env
        if "RANK" in env or "WORLD_SIZE" in env:
            world = _from_torchrun(env)
        elif _is_slurm_task(env) and _slurm_size(env) > 1:
            world = _from_slurm(env)
        else:
            world = cls(threads=threads_from_environment(env))
        return world

    def at_most(self, microbatches: int) -> World:
        """The world with no more workers than there are microbatches. *local*

        Call it on every worker before the workers first meet. If `unisono run` chose their number, the surplus ones
        leave here: they end with status 0, and the others get a world without them. A worker that joins later has no
        number among all workers yet and is let through.

        Raises:
            ConfigurationError: More workers were asked for than there are microbatches.
            SystemExit: With status 0, on a worker that is not needed.
        """
        if self.size <= microbatches or self.joins:
            return self
        if not self.size_defaulted or self.minimum > microbatches:
            raise ConfigurationError(
                f"{self.size} workers but only {microbatches} microbatches: each worker needs at least one. "
                f"Start at most {microbatches} workers or raise microbatches to {self.size} or more."
            )
        if self.rank >= microbatches:
            raise SystemExit(0)
        fewer, here = self.founders[:microbatches], min(self.local_size, microbatches)
        return dataclasses.replace(self, size=microbatches, local_size=here, founders=fewer)


def threads_from_environment(env: Mapping[str, str]) -> int:
    """Threads per worker: UNISONO_THREADS, else OMP_NUM_THREADS (its first number), else 1. *local*

    Raises:
        ConfigurationError: The variable is not a whole number of at least 1.
    """
    for name in ("UNISONO_THREADS", "OMP_NUM_THREADS"):
        text = env.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS=4,2 names one count per nesting level
        if text:
            return _number(env, name, text=text, least=1)
    return 1


def _from_torchrun(env: Mapping[str, str]) -> World:
    launched_by_us = env.get("UNISONO_LAUNCHED") == "1"
    for lesser, greater in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        _check_below(lesser, _number(env, lesser), greater, _number(env, greater, least=1))
    if _number(env, "LOCAL_WORLD_SIZE") > _number(env, "WORLD_SIZE"):
        raise ConfigurationError(
            f"LOCAL_WORLD_SIZE={env['LOCAL_WORLD_SIZE']} is more than WORLD_SIZE={env['WORLD_SIZE']}: a host cannot "
            "have more workers than there are in all. Let one launcher (unisono run or torchrun) set both."
        )
    world = World(
        rank=_number(env, "RANK"),
        size=_number(env, "WORLD_SIZE", least=1),
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=_number(env, "LOCAL_WORLD_SIZE", least=1),
        threads=threads_from_environment(env),
        launcher=UNISONO_RUN if launched_by_us else TORCHRUN,
        master_addr=_text(env, "MASTER_ADDR"),
        master_port=_port(env),
        size_defaulted=launched_by_us and env.get("UNISONO_WORKERS_DEFAULTED") == "1",
    )
    return _with_store(world, env) if launched_by_us and "UNISONO_STORE" in env else world


def _with_store(world: World, env: Mapping[str, str]) -> World:
    """What `unisono run` says beside torchrun's variables, so that workers may die, join and leave."""
    uid, joins = _text(env, "UNISONO_UID"), env.get("UNISONO_JOINS") == "1"
    # Surplus workers may have left before (see World.at_most): then the size is smaller than it was.
    founders = () if joins else tuple(_text(env, "UNISONO_FOUNDERS").split(",")[: world.size])
    if not joins and (len(founders) < world.size or founders[world.rank] != uid):
        raise ConfigurationError(
            f"UNISONO_FOUNDERS={','.join(founders)} contradicts RANK={world.rank}, WORLD_SIZE={world.size} and "
            f"UNISONO_UID={uid}. Let unisono run set these variables."
        )
    return dataclasses.replace(
        world,
        store=_text(env, "UNISONO_STORE"),
        session="unisono.elastic.session:ElasticSession",
        attempt=_number(env, "UNISONO_ATTEMPT"),
        uid=uid,
        founders=founders,
        joins=joins,
        minimum=_number(env, "UNISONO_MINIMUM", least=1),
        wait_s=_seconds(env, "UNISONO_WAIT"),
        terminal=_descriptors(env, "UNISONO_TERMINAL") if "UNISONO_TERMINAL" in env else None,
    )


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script, too, has SLURM_PROCID and SLURM_NTASKS, but no such step."""
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_SPECIAL_SLURM_STEP


def _slurm_size(env: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _number(env, name, least=1)


def _from_slurm(env: Mapping[str, str]) -> World:
    _check_below("SLURM_PROCID", _number(env, "SLURM_PROCID"), "the number of tasks", _slurm_size(env))
    _check_below("SLURM_LOCALID", _number(env, "SLURM_LOCALID"), "the tasks of this host", _slurm_local_size(env))
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST"
    # Jobs that share a host need different ports, and all workers of one job the same: its number gives both.
    port = _port(env) if "MASTER_PORT" in env else 15000 + _number(env, "SLURM_JOB_ID") % 20000
    return World(
        rank=_number(env, "SLURM_PROCID"),
        size=_slurm_size(env),
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=_slurm_local_size(env),
        threads=threads_from_environment(env),
        launcher=SLURM,
        master_addr=env.get("MASTER_ADDR") or expand_hosts(_text(env, nodes))[0],
        master_port=port,
    )


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks of this host, from e.g. SLURM_STEP_TASKS_PER_NODE="2(x3),1" (three hosts with 2, one with 1)."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return _number(env, "SLURM_NTASKS_PER_NODE", least=1)
    tasks: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigurationError(f"{name}={env[name]!r} is not a list of task counts such as '2(x3),1'.")
        tasks += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID") if len(tasks) > 1 else 0
    if node >= len(tasks):
        raise ConfigurationError(f"SLURM_NODEID={node} but {name}={env[name]!r} names only {len(tasks)} hosts.")
    return tasks[node]


def expand_hosts(nodelist: str) -> list[str]:
    """Host names of a Slurm node list: "node[001-003,7],gpu3" gives node001, node002, node003, node7, gpu3. *local*

    Raises:
        ConfigurationError: The text is no such list.
    """
    hosts: list[str] = []
    for item in re.split(r",(?![^\[]*\])", nodelist.strip()):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]+)\]", item):
            ends = [plain] if plain else _expand_ranges(ranges, nodelist)
            names = [name + end for name in names for end in ends]
        if names == [""] or item.count("[") != item.count("]"):
            raise ConfigurationError(f"{nodelist!r} is not a Slurm node list such as 'node[001-003,7],gpu3'.")
        hosts += names
    return hosts


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigurationError(f"{part!r} in the Slurm node list {nodelist!r} is not a range such as 001-004.")
        first, last = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        found = ", ".join(f"{key}={env[key]}" for key in ("RANK", "WORLD_SIZE", "SLURM_PROCID") if key in env)
        raise ConfigurationError(
            f"{name} is not set, although this process looks like one of several workers ({found}). "
            "Start it with unisono run, torchrun or srun, or unset these variables to run alone."
        )
    return value


def _number(env: Mapping[str, str], name: str, *, text: str | None = None, least: int = 0) -> int:
    text = _text(env, name) if text is None else text
    if not text.isdecimal() or int(text) < least:
        raise ConfigurationError(f"{name}={text!r} is not a whole number of at least {least}. Correct or unset it.")
    return int(text)


def _seconds(env: Mapping[str, str], name: str) -> float:
    text = _text(env, name)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ConfigurationError(f"{name}={text!r} is not a number of seconds. Correct or unset it.")
    return seconds


def _descriptors(env: Mapping[str, str], name: str) -> tuple[int, int]:
    text = _text(env, name)
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match is None:
        raise ConfigurationError(f"{name}={text!r} is not a pair of descriptors such as '5,6'. Unset it.")
    return int(match[1]), int(match[2])


def _port(env: Mapping[str, str]) -> int:
    port = _number(env, "MASTER_PORT", least=1)
    if port > 65535:
        raise ConfigurationError(f"MASTER_PORT={port} is not a port: it must lie between 1 and 65535.")
    return port


def _check_below(name: str, number: int, whole: str, count: int) -> None:
    if number >= count:
        raise ConfigurationError(
            f"{name}={number} contradicts {whole}={count}: it must lie between 0 and {count - 1}. "
            "Let one launcher (unisono run, torchrun or srun) set these variables."
        )


def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may really use: the fewest of its affinity and its cgroups' quotas. *local*

    Args:
        root: Where /proc and /sys/fs/cgroup are looked up.

    Returns:
        At least 1. A quota of two and a half cores counts as 2: a third thread would only wait.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, cpu_quota(root))))


def room_for_workers(threads: int, root: Path = Path("/")) -> int:
    """How many workers a run has on this machine unless told otherwise: one for each GPU, without GPUs as many as its cores
    carry. *local*

    Args:
        threads: Threads per worker.
        root: Where devices are looked up.
    """
    gpus = 0
    if any((root / device).exists() for device in _GPU_DEVICES):  # else PyTorch need not be imported to know
        with contextlib.suppress(ImportError, OSError):  # a broken PyTorch: the workers will say what it lacks
            import torch

            gpus = torch.cuda.device_count()
    return gpus or max(1, usable_cores(root) // threads)
