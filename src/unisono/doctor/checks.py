"""Facts about one host -> findings. Pure functions of the facts, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from unisono.doctor.facts import BuildFacts, WorkerFacts
from unisono.doctor.findings import Finding, finding
from unisono.observe.formats import count, data_size, percent

_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_DOCKER_SHM_BYTES = 64 * 1024 * 1024
_CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
_MIN_MEMORY, _GOOD_MEMORY = 100e6, 1e9
_SPARE_FILES, _USUAL_FILES = 64, 1024
_LONGEST_SOCKET_PATH = 107
_SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""What Python's multiprocessing adds to the temporary folder for the socket of a loader worker."""
_SOME, _MUCH = 0.02, 0.10
_OTHER_CORES = 0.25


def check_host(workers: Sequence[WorkerFacts]) -> list[Finding]:
    """What the facts about one host mean. *local*

    Args:
        workers: The workers of this host that were examined; at least one.
    """
    first = workers[0]
    findings = [
        cores(workers),
        threads(first),
        memory(workers),
        shared_memory_folder(first),
        temporary_folder(first),
        open_files(first),
        throttling(workers),
        *processor_time(workers),
    ]
    if first.build is not None:
        findings += [build(first.build), determinism(first, first.build), gpus(first, first.build)]
    return [replace(found, host=first.host) for found in findings]


def cores(workers: Sequence[WorkerFacts]) -> Finding:
    """Whether the workers of a run have a core for each thread, under affinity and quota."""
    first, machine = workers[0], workers[0].machine
    allowed = len({core for worker in workers for core in worker.machine.affinity})
    usable = allowed if machine.quota is None else min(allowed, machine.quota)
    have = count(machine.cores, "core") + (f", of which affinity allows {allowed}" if allowed < machine.cores else "")
    have += ", no cgroup quota" if machine.quota is None else f", cgroup quota {machine.quota:g}"
    plan = f"{count(first.planned, 'worker')} x {count(first.threads, 'thread')}"
    need = first.planned * first.threads
    if need <= usable:
        return finding("cores", f"{have}: enough for {plan}")
    pinned = [f"{name}={machine.variables[name]}" for name in _PINNING if name in machine.variables]
    if usable < allowed:
        more = "raise the quota (docker --cpus, Kubernetes limits.cpu, systemd CPUQuota)"
    elif pinned:
        more = f"unset {', '.join(pinned)}, which binds every worker to the same cores"
    elif allowed < machine.cores:
        more = "widen the affinity (taskset, docker --cpuset-cpus, Slurm --cpus-per-task)"
    else:
        more = "use a machine with more cores"
    if fit := int(usable // first.threads):
        advice = f"Start {count(fit, 'worker')} (--workers {fit}, torchrun --nproc-per-node {fit}), or {more}."
    else:
        advice = f"{more[0].upper()}{more[1:]}."
    return finding("cores", f"{have}: {usable:g} usable, but {plan} keep {need} busy", problem=advice)


def threads(worker: WorkerFacts) -> Finding:
    """Whether each worker has the number of threads that a run counts on."""
    fact = f"{worker.threads} a worker"
    if worker.build is None or worker.build.threads == worker.threads:
        return finding("threads", f"{fact} (bits depend on it: keep --threads, UNISONO_THREADS or OMP_NUM_THREADS as they are)")
    return finding(
        "threads",
        f"{fact}, but PyTorch uses {worker.build.threads}",
        problem="Something sets PyTorch's threads when Python starts (sitecustomize, a .pth file): remove it.",
    )


def memory(workers: Sequence[WorkerFacts]) -> Finding:
    """Whether there is room for the workers of a run, before they have a model."""
    first, machine = workers[0], workers[0].machine
    own = max(worker.machine.process_memory for worker in workers)
    limit = "no cgroup limit" if machine.memory_limit is None else f"cgroup limit {data_size(machine.memory_limit)}"
    # Those that were examined were running when it was measured.
    each = (machine.memory_free - own * max(0, first.planned - len(workers))) / first.planned
    few = f"{count(first.planned, 'worker')} do not fit: start fewer, or raise the limit (docker --memory, Kubernetes "
    little = f"{data_size(each)} a worker for model, gradients, optimizer state and data: start fewer workers or raise the limit "
    return finding(
        "memory",
        f"{data_size(machine.memory_free)} free of {data_size(machine.memory)} ({limit}); "
        f"a worker takes {data_size(own)} before it has a model",
        problem=f"{few}limits.memory, Slurm --mem)." if each < _MIN_MEMORY else "",
        note=f"{little}if that is not enough." if each < _GOOD_MEMORY else "",
    )


def shared_memory_folder(worker: WorkerFacts) -> Finding:
    """/dev/shm, through which DataLoader workers send batches; unisono's own shared memory needs none."""
    size, free = worker.machine.shm_size, worker.machine.shm_free
    whom = "only DataLoader(num_workers > 0) uses it, unisono's workers share memory without it"
    if size is None or free is None:
        return finding("/dev/shm", f"missing; {whom}", note="Mount a tmpfs there, or use no loader workers.")
    advice = (
        "Loader workers die of a bus error if their batches in flight (workers x loader workers x prefetch_factor) do "
        "not fit: docker run --shm-size=2g, in Kubernetes an emptyDir of medium Memory, or no loader workers."
    )
    small = free <= _DOCKER_SHM_BYTES
    return finding("/dev/shm", f"{data_size(free)} free of {data_size(size)}; {whom}", note=advice if small else "")


def temporary_folder(worker: WorkerFacts) -> Finding:
    """Where loader workers put the sockets by which they send batches: the system limits the length of such a path."""
    folder = worker.machine.temporary_folder
    longest, length = _LONGEST_SOCKET_PATH - len(_SOCKET_NAME), len(os.fsencode(folder))
    advice = (
        f"A DataLoader with loader workers hangs: the path of their sockets is too long. Set TMPDIR to a folder of at most "
        f"{longest} bytes (this one has {length}), or use no loader workers."
    )
    return finding("temporary folder", folder, note=advice if length > longest else "")


def open_files(worker: WorkerFacts) -> Finding:
    """The limit on open files: sockets between workers, and a descriptor for each tensor that a loader worker sends."""
    limit, hard, now = worker.machine.open_files_limit, worker.machine.open_files_hard, worker.machine.open_files
    if limit is None:
        return finding("open files", "no limit")
    can_raise = hard is None or hard > limit
    raise_it = f"ulimit -n {hard or 65536}" if can_raise else "raise it (limits.conf, docker --ulimit nofile)"
    too_few, few = limit < now + 2 * worker.planned + _SPARE_FILES, limit < _USUAL_FILES
    return finding(
        "open files",
        f"limit {limit:,}; a worker has {now} open before it has data",
        problem=f"Too few for sockets and data: {raise_it}." if too_few else "",
        note=f"Loader workers take one for each tensor in flight: {raise_it}." if few else "",
    )


def throttling(workers: Sequence[WorkerFacts]) -> Finding:
    """Whether the CPU quota stopped the workers."""
    before, after, quota = workers[0].before, workers[0].after, workers[0].machine.quota
    if not after.periods:
        return finding("throttling", "none: no cgroup quota is counted")
    periods, throttled = after.periods - before.periods, after.throttled_periods - before.throttled_periods
    now, ever = throttled / periods if periods else 0.0, after.throttled_periods / after.periods
    advice = "Start fewer workers, stop what else runs in this cgroup, or raise the quota."
    # With less quota than the examined workers can use, the examination itself used it up.
    innocent = quota is not None and quota >= len(workers)
    return finding(
        "throttling",
        f"out of quota in {percent(now)} of the periods during this check, {percent(ever)} since the cgroup began",
        problem=advice if now >= _MUCH and innocent else "",
        note=advice if max(now, ever) >= _SOME else "",
    )


def processor_time(workers: Sequence[WorkerFacts]) -> list[Finding]:
    """What took cores from the workers during the examination: the hypervisor, other programs."""
    first, before, after = workers[0], workers[0].before, workers[0].after
    elapsed_s, total_s = after.time_s - before.time_s, after.total_s - before.total_s
    if elapsed_s <= 0 or total_s <= 0:
        return []
    stolen = (after.stolen_s - before.stolen_s) / total_s
    own_s = sum(worker.after.process_s - worker.before.process_s for worker in workers)
    others = max(0.0, (after.busy_s - before.busy_s - own_s) / elapsed_s)
    crowded = others >= _OTHER_CORES and others + first.planned * first.threads > first.machine.cores + _OTHER_CORES
    steal_advice = "Other virtual machines take this one's time: ask for cores of its own."
    crowd_advice = "They slow every step down, and make the figures below too low: stop them, or use fewer workers."
    return [
        finding(
            "steal time",
            f"{percent(stolen)} of the processor time went to other virtual machines",
            problem=steal_advice if stolen >= _MUCH else "",
            note=steal_advice if stolen >= _SOME else "",
        ),
        finding(
            "other programs",
            f"used {others:.1f} of {count(first.machine.cores, 'core')} during this check",
            note=crowd_advice if crowded else "",
        ),
    ]


def build(found: BuildFacts) -> Finding:
    """PyTorch and its math libraries, and variables that make them choose other kernels."""
    fields = found.fingerprint
    parts = [f"torch {fields.get('torch')}"]
    parts += [f"{label} {fields[name]}" for name, label in (("mkl", "MKL"), ("mkldnn", "oneDNN")) if name in fields]
    parts += [str(fields.get("cpu_capability")), f"numpy {fields.get('numpy')}", str(fields.get("python"))]
    fact = ", ".join(part.split(" (Git")[0] for part in parts)
    chosen = [f"{name}={value}" for name, value in fields.items() if name.isupper() and name != "CUBLAS_WORKSPACE_CONFIG"]
    advice = "These variables choose kernels, and so bits: keep them for the whole run and on all hosts, or unset them."
    return finding("PyTorch", "; ".join([fact, *filter(None, [", ".join(chosen)])]), note=advice if chosen else "")


def determinism(worker: WorkerFacts, found: BuildFacts) -> Finding:
    """Whether the settings in force give one result."""
    fact, problem, note = "float32 products in full precision", "", ""
    config = worker.machine.variables.get("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_DETERMINISTIC[0])
    if found.matmul_precision != "highest":
        fact = f"float32 products in reduced precision ({found.matmul_precision})"
        note = 'Is that intended? Otherwise call torch.set_float32_matmul_precision("highest").'
    elif worker.device == "cuda" and config not in _CUBLAS_DETERMINISTIC:
        fact = f"CUBLAS_WORKSPACE_CONFIG={config}"
        problem = "cuBLAS is not deterministic with it: unset it, or set it to :4096:8."
    elif worker.device == "cuda" and not found.deterministic:
        fact = "nondeterministic CUDA kernels are allowed"
        problem = "Something switches torch.use_deterministic_algorithms off when Python starts: remove it."
    elif worker.device == "cuda":
        fact = f"deterministic CUDA kernels only, {fact}"
    elif worker.threads == 1:
        fact = f"one thread a worker has one order, {fact}"
    else:
        fact = f"deterministic kernels {'only' if found.deterministic else 'not enforced'}, {fact}"
    return finding("determinism", fact, problem=problem, note=note)


def gpus(worker: WorkerFacts, found: BuildFacts) -> Finding:
    """GPUs, whether there is one a worker, and how they reach each other."""
    if not found.gpus:
        return _no_gpus(worker, found)
    number = len(found.gpus)
    models = sorted({f"{gpu.name} ({data_size(gpu.memory)})" for gpu in found.gpus})
    kinds = sorted({link for gpu in found.gpus for link in gpu.links.values()})
    fact = f"{number} x {', '.join(models)}" + (f", links {', '.join(kinds)}" if kinds else "")
    apart = [str(own) for own, gpu in enumerate(found.gpus) if len(gpu.peers) < number - 1]
    problem = note = ""
    own_only = number == 1 and worker.device == "cuda"  # each worker may have been shown its own GPU only
    if worker.planned > number and not own_only:
        fact += f", for {count(worker.planned, 'worker')}"
        problem = f"One worker a GPU: start {number} (--workers {number}), or pass device='cpu' to Trainer."
    elif len(models) > 1:
        problem = "Different models give different bits: use GPUs of one model."
    elif apart:
        fact += f"; not all reach each other's memory (GPU {', '.join(apart)})"
        note = "Messages go by the host's memory, which is slower: see nvidia-smi topo -p2p r, and IOMMU or ACS settings."
    return finding("GPUs", fact, problem=problem, note=note)


def _no_gpus(worker: WorkerFacts, found: BuildFacts) -> Finding:
    hidden = worker.machine.variables.get("CUDA_VISIBLE_DEVICES")
    fact = f"{count(found.gpus_present, 'GPU')} here, but PyTorch sees none"
    if not found.gpus_present:
        return finding("GPUs", "none: workers compute on the CPU")
    if hidden is not None:
        return finding("GPUs", f"{fact} (CUDA_VISIBLE_DEVICES={hidden!r})", note="Unset the variable to use them.")
    if found.cuda is None:
        return finding("GPUs", fact, problem="This PyTorch is a CPU build: install one for CUDA.")
    return finding("GPUs", fact, problem=f"Its CUDA {found.cuda} does not go with the driver: update one of them.")
