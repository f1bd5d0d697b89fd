"""What facts about one host mean."""

from __future__ import annotations

from typing import Any

import pytest

from tests.doctor.made_up import GIB, build, counters, gpus, machine, worker
from unisono.doctor.checks import check_host
from unisono.doctor.facts import WorkerFacts
from unisono.doctor.findings import Finding, Level


def found(name: str, *workers: WorkerFacts) -> Finding:
    (finding,) = [finding for finding in check_host(workers) if finding.name == name]
    return finding


def test_a_healthy_host_is_fine_throughout() -> None:
    findings = check_host([worker(0), worker(1)])
    assert {finding.level for finding in findings} == {Level.FINE}
    assert not any(finding.advice for finding in findings)
    assert {finding.host for finding in findings} == {"alpha"}


def test_more_workers_than_the_quota_feeds_are_a_problem() -> None:
    finding = found("cores", worker(planned=4, machine=machine(quota=1.5)))
    assert finding.level == Level.PROBLEM
    assert finding.fact == "8 cores, cgroup quota 1.5: 1.5 usable, but 4 workers x 1 thread keep 4 busy"
    assert "--workers 1" in finding.advice
    assert "raise the quota" in finding.advice


def test_a_quota_below_one_core_cannot_be_helped_by_fewer_workers() -> None:
    finding = found("cores", worker(planned=1, machine=machine(quota=0.5)))
    assert finding.level == Level.PROBLEM
    assert finding.advice.startswith("Raise the quota")


def test_a_quota_that_suffices_is_fine() -> None:
    assert found("cores", worker(planned=1, machine=machine(quota=1.5))).level == Level.FINE


def test_threads_need_cores_too() -> None:
    finding = found("cores", worker(planned=4, threads=3))
    assert finding.level == Level.PROBLEM
    assert "--workers 2" in finding.advice


def test_a_narrow_affinity_is_a_problem() -> None:
    finding = found("cores", worker(0, machine=machine(affinity=[3])), worker(1, machine=machine(affinity=[3])))
    assert finding.level == Level.PROBLEM
    assert "affinity allows 1" in finding.fact
    assert "widen the affinity" in finding.advice


def test_workers_bound_to_cores_of_their_own_are_fine() -> None:
    assert found("cores", worker(0, machine=machine(affinity=[0])), worker(1, machine=machine(affinity=[1]))).level == Level.FINE


def test_the_variable_that_binds_all_workers_to_one_core_is_named() -> None:
    bound = machine(affinity=[0], variables={"OMP_PROC_BIND": "true"})
    assert "unset OMP_PROC_BIND=true" in found("cores", worker(0, machine=bound), worker(1, machine=bound)).advice


def test_a_thread_count_that_pytorch_does_not_follow_is_a_problem() -> None:
    assert found("threads", worker(build=build(threads=8))).level == Level.PROBLEM


@pytest.mark.parametrize(
    ("free", "planned", "level"),
    [(60 * GIB, 8, Level.FINE), (3 * GIB, 4, Level.NOTE), (GIB // 2, 4, Level.PROBLEM), (0, 1, Level.PROBLEM)],
)
def test_memory_is_judged_by_what_is_left_for_each_worker(free: int, planned: int, level: Level) -> None:
    assert found("memory", worker(planned=planned, machine=machine(memory_free=free, memory_limit=4 * GIB))).level == level


@pytest.mark.parametrize(("size", "level"), [(2**26, Level.NOTE), (None, Level.NOTE), (2 * GIB, Level.FINE)])
def test_a_small_dev_shm_matters_to_loader_workers_only(size: int | None, level: Level) -> None:
    finding = found("/dev/shm", worker(machine=machine(shm_size=size, shm_free=size)))
    assert finding.level == level
    assert "only DataLoader" in finding.fact


@pytest.mark.parametrize(("length", "level"), [(75, Level.FINE), (76, Level.NOTE)])
def test_a_long_temporary_folder_leaves_loader_workers_without_sockets(length: int, level: Level) -> None:
    finding = found("temporary folder", worker(machine=machine(temporary_folder="/" + "x" * (length - 1))))
    assert finding.level == level
    assert ("at most 75 bytes (this one has 76)" in finding.advice) == (level == Level.NOTE)


@pytest.mark.parametrize(
    ("limit", "hard", "level", "advice"),
    [
        (64, 4096, Level.PROBLEM, "ulimit -n 4096"),
        (256, None, Level.NOTE, "ulimit -n 65536"),
        (256, 256, Level.NOTE, "docker --ulimit"),
        (1024, 1024, Level.FINE, ""),
        (None, None, Level.FINE, ""),
    ],
)
def test_the_limit_on_open_files(limit: int | None, hard: int | None, level: Level, advice: str) -> None:
    finding = found("open files", worker(machine=machine(open_files_limit=limit, open_files_hard=hard)))
    assert finding.level == level
    assert advice in finding.advice


def after(**changes: Any) -> Any:
    return counters(**({"time_s": 2.0, "busy_s": 3.0, "total_s": 16.0, "process_s": 1.5} | changes))


@pytest.mark.parametrize(
    ("periods", "throttled", "quota", "level"),
    [
        (100, 0, 4.0, Level.FINE),
        (100, 5, 4.0, Level.NOTE),
        (100, 50, 4.0, Level.PROBLEM),
        (100, 50, 1.0, Level.NOTE),  # two examined workers use up one core: their own doing
    ],
)
def test_throttling_that_others_cause_is_a_problem(periods: int, throttled: int, quota: float, level: Level) -> None:
    workers = [
        worker(rank, machine=machine(quota=quota), after=after(periods=periods, throttled_periods=throttled)) for rank in (0, 1)
    ]
    assert found("throttling", *workers).level == level


def test_throttling_before_the_check_is_a_note() -> None:
    past = worker(before=counters(periods=1000, throttled_periods=300), after=after(periods=1020, throttled_periods=300))
    finding = found("throttling", past)
    assert finding.level == Level.NOTE
    assert "29% since" in finding.fact


@pytest.mark.parametrize(("stolen_s", "level"), [(0.0, Level.FINE), (0.5, Level.NOTE), (4.0, Level.PROBLEM)])
def test_stolen_time_is_judged_by_its_share(stolen_s: float, level: Level) -> None:
    assert found("steal time", worker(after=after(stolen_s=stolen_s))).level == level


def test_other_programs_matter_where_cores_are_short() -> None:
    busy = after(busy_s=9.0)
    few = machine(cores=4, affinity=[0, 1, 2, 3])
    crowded = found("other programs", worker(0, machine=few, after=busy), worker(1, machine=few, after=busy))
    assert (crowded.level, crowded.fact) == (Level.NOTE, "used 3.0 of 4 cores during this check")
    assert found("other programs", worker(0, after=busy), worker(1, after=busy)).level == Level.FINE


def test_variables_that_choose_kernels_are_named() -> None:
    finding = found("PyTorch", worker(build=build(fingerprint={"torch": "2.13.0", "ONEDNN_MAX_CPU_ISA": "AVX2"})))
    assert finding.level == Level.NOTE
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in finding.fact


def test_reduced_precision_is_a_note() -> None:
    assert found("determinism", worker(build=build(matmul_precision="medium"))).level == Level.NOTE


@pytest.mark.parametrize(
    ("deterministic", "variables", "level"),
    [
        (True, {}, Level.FINE),
        (True, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, Level.FINE),
        (True, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, Level.PROBLEM),
        (False, {}, Level.PROBLEM),
    ],
)
def test_a_gpu_needs_deterministic_kernels(deterministic: bool, variables: dict[str, str], level: Level) -> None:
    settings = build(gpus=gpus(2), deterministic=deterministic)
    assert found("determinism", worker(device="cuda", build=settings, machine=machine(variables=variables))).level == level


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, Level.FINE, "none"),
        ({"gpus": gpus(2)}, Level.FINE, "2 x H100 (85.9 GB), links NV18"),
        ({"gpus": gpus(2, reach=False)}, Level.NOTE, "not all reach each other"),
        ({"gpus": gpus(1)}, Level.PROBLEM, "for 2 workers"),
        ({"gpus_present": 2}, Level.PROBLEM, "PyTorch sees none"),
        ({"gpus_present": 2, "cuda": "12.8"}, Level.PROBLEM, "PyTorch sees none"),
    ],
)
def test_gpus(changes: dict[str, Any], level: Level, words: str) -> None:
    finding = found("GPUs", worker(build=build(**changes)))
    assert finding.level == level
    assert words in finding.fact


def test_workers_that_are_shown_one_gpu_each_are_fine() -> None:
    assert found("GPUs", worker(device="cuda", build=build(gpus=gpus(1)))).level == Level.FINE


def test_hidden_gpus_are_a_note() -> None:
    hidden = worker(build=build(gpus_present=2), machine=machine(variables={"CUDA_VISIBLE_DEVICES": ""}))
    assert found("GPUs", hidden).level == Level.NOTE


def test_a_worker_that_never_got_to_pytorch_is_judged_by_its_machine_alone() -> None:
    names = [finding.name for finding in check_host([worker(build=None)])]
    assert "cores" in names
    assert "PyTorch" not in names
