"""Facts about one host -> findings. Pure functions of the facts, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from unisono.doctor.findings import Finding, finding
from unisono.doctor.records import Build, Worker
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


def check_host(workers: Sequence[Worker]) -> list[Finding]:
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
        *processor_time(workers),
    ]
    if first.build is not None:
        findings += [build(first.build), determinism(first, first.build), gpus(first, first.build)]
    return [replace(found, host=first.host) for found in findings]


def cores(workers: Sequence[Worker]) -> Finding:
    """Whether the workers of a run have a core for each thread, under affinity and quota."""
    first = workers[0]
    machine = first.machine
    allowed = {core for worker in workers for core in worker.machine.affinity}
    usable = min(float(len(allowed)), len(allowed) if machine.quota is None else machine.quota)
    need = first.planned * first.threads
    have = count(machine.cores, "core")
    if len(allowed) < machine.cores:
        have += f", of which affinity allows {len(allowed)}"
    have += f", cgroup quota {machine.quota:g}" if machine.quota is not None else ", no cgroup quota"
    plan = f"{count(first.planned, 'worker')} x {count(first.threads, 'thread')}"
    if need <= usable:
        return finding("cores", f"{have}: enough for {plan}")
    by_quota = machine.quota is not None and machine.quota < len(allowed)
    pinned = [f"{name}={machine.variables[name]}" for name in _PINNING if name in machine.variables]
    if by_quota:
        more = "raise the quota (docker --cpus, Kubernetes limits.cpu, systemd CPUQuota)"
    elif pinned:
        more = f"unset {', '.join(pinned)}, which binds every worker to the same cores"
    elif len(allowed) < machine.cores:
        more = "widen the affinity (taskset, docker --cpuset-cpus, Slurm --cpus-per-task)"
    else:
        more = "use a machine with more cores"
    fit = int(usable // first.threads)
    less = f"Start {count(fit, 'worker')} (--workers {fit}, torchrun --nproc-per-node {fit}), or " if fit else ""
    return finding(
        "cores",
        f"{have}: {usable:g} usable, but {plan} keep {need} busy",
        problem=less + (more if less else more[0].upper() + more[1:]) + ".",
    )


def threads(worker: Worker) -> Finding:
    """Whether each worker has the number of threads that a run counts on."""
    fact = f"{worker.threads} a worker"
    if worker.build is not None and worker.build.threads != worker.threads:
        return finding(
            "threads",
            f"{fact}, but PyTorch uses {worker.build.threads}",
            problem="Something sets PyTorch's threads when Python starts (sitecustomize, a .pth file): remove it.",
        )
    return finding("threads", f"{fact} (bits depend on it: keep --threads, UNISONO_THREADS or OMP_NUM_THREADS as they are)")


def memory(workers: Sequence[Worker]) -> Finding:
    """Whether there is room for the workers of a run, before they have a model."""
    first = workers[0]
    machine = first.machine
    if machine.memory is None or machine.memory_free is None:
        return finding("memory", "unknown: /proc/meminfo cannot be read")
    own = max((worker.machine.process_memory or 0 for worker in workers), default=0)
    limit = "no cgroup limit" if machine.memory_limit is None else f"cgroup limit {data_size(machine.memory_limit)}"
    fact = (
        f"{data_size(machine.memory_free)} free of {data_size(machine.memory)} ({limit}); "
        f"a worker takes {data_size(own)} before it has a model"
    )
    # Those that were examined were running when it was measured.
    each = (machine.memory_free - own * max(0, first.planned - len(workers))) / first.planned
    if each < _MIN_MEMORY:
        return finding(
            "memory",
            fact,
            problem=f"{count(first.planned, 'worker')} do not fit: start fewer, or raise the limit (docker --memory, "
            "Kubernetes limits.memory, Slurm --mem).",
        )
    if each < _GOOD_MEMORY:
        return finding(
            "memory",
            fact,
            note=f"{data_size(each)} a worker for model, gradients, optimizer state and data: start fewer workers or raise the "
            "limit if that is not enough.",
        )
    return finding("memory", fact)


def shared_memory_folder(worker: Worker) -> Finding:
    """/dev/shm, through which DataLoader workers send batches; unisono's own shared memory needs none."""
    size, free = worker.machine.shm_size, worker.machine.shm_free
    name, whom = "/dev/shm", "only DataLoader(num_workers > 0) uses it, unisono's workers share memory without it"
    if size is None or free is None:
        return finding(name, f"missing; {whom}", note="Mount a tmpfs there, or use no loader workers.")
    fact = f"{data_size(free)} free of {data_size(size)}; {whom}"
    if free <= _DOCKER_SHM_BYTES:
        return finding(
            name,
            fact,
            note="Loader workers die of a bus error if their batches in flight (workers x loader workers x prefetch_factor) do "
            "not fit: docker run --shm-size=2g, in Kubernetes an emptyDir of medium Memory, or no loader workers.",
        )
    return finding(name, fact)


def temporary_folder(worker: Worker) -> Finding:
    """Where loader workers put the sockets by which they send batches: the system limits the length of such a path."""
    folder = worker.machine.temporary_folder
    longest = _LONGEST_SOCKET_PATH - len(_SOCKET_NAME)
    length = len(os.fsencode(folder))
    if length <= longest:
        return finding("temporary folder", folder)
    return finding(
        "temporary folder",
        folder,
        note=f"A DataLoader with loader workers hangs: the path of their sockets is too long. Set TMPDIR to a folder of at most "
        f"{longest} bytes (this one has {length}), or use no loader workers.",
    )


def open_files(worker: Worker) -> Finding:
    """The limit on open files: sockets between workers, and a descriptor for each tensor that a loader worker sends."""
    machine = worker.machine
    if machine.open_files_limit is None:
        return finding("open files", "no limit")
    fact = f"limit {machine.open_files_limit:,}; a worker has {machine.open_files} open before it has data"
    enough = machine.open_files_hard is None or machine.open_files_hard > machine.open_files_limit
    raise_it = f"ulimit -n {machine.open_files_hard or 65536}" if enough else "raise it (limits.conf, docker --ulimit nofile)"
    if machine.open_files_limit < machine.open_files + 2 * worker.planned + _SPARE_FILES:
        return finding("open files", fact, problem=f"Too few for sockets and data: {raise_it}.")
    if machine.open_files_limit < _USUAL_FILES:
        return finding("open files", fact, note=f"Loader workers take one for each tensor under way: {raise_it}.")
    return finding("open files", fact)


def processor_time(workers: Sequence[Worker]) -> list[Finding]:
    """What kept the workers from their cores during the examination: quota, hypervisor, other programs."""
    first = workers[0]
    before, after = first.before, first.after
    periods, throttled = after.periods - before.periods, after.throttled_periods - before.throttled_periods
    ever = after.throttled_periods / after.periods if after.periods else 0.0
    found: list[Finding] = []
    if after.periods:
        now = throttled / periods if periods else 0.0
        fact = f"out of quota in {percent(now)} of the periods during this check, {percent(ever)} since the cgroup began"
        advice = "Start fewer workers, stop what else runs in this cgroup, or raise the quota."
        # With less quota than the examined workers can use, the examination itself used it up.
        quota = first.machine.quota
        innocent = quota is not None and quota >= len(workers)
        if now >= _MUCH and innocent:
            found.append(finding("throttling", fact, problem=advice))
        else:
            found.append(finding("throttling", fact, note=advice if max(now, ever) >= _SOME else ""))
    else:
        found.append(finding("throttling", "none: no cgroup quota is counted"))
    elapsed_s = after.time_s - before.time_s
    total_s = after.total_s - before.total_s
    if elapsed_s <= 0 or total_s <= 0:
        return found
    stolen = (after.stolen_s - before.stolen_s) / total_s
    own_s = sum(worker.after.process_s - worker.before.process_s for worker in workers)
    others = max(0.0, (after.busy_s - before.busy_s - own_s) / elapsed_s)
    advice = "Other virtual machines take this one's time: ask for cores of its own."
    found.append(
        finding(
            "steal time",
            f"{percent(stolen)} of the processor time went to other virtual machines",
            problem=advice if stolen >= _MUCH else "",
            note=advice if stolen >= _SOME else "",
        )
    )
    crowded = others >= _OTHER_CORES and others + first.planned * first.threads > first.machine.cores + _OTHER_CORES
    found.append(
        finding(
            "other programs",
            f"used {others:.1f} of {count(first.machine.cores, 'core')} during this check",
            note="They slow every step down, and make the figures below too low: stop them, or use fewer workers."
            if crowded
            else "",
        )
    )
    return found


def build(found: Build) -> Finding:
    """PyTorch and its math libraries, and variables that make them choose other kernels."""
    fields = found.fingerprint
    parts = [f"torch {fields.get('torch')}"]
    parts += [f"{label} {fields[name]}" for name, label in (("mkl", "MKL"), ("mkldnn", "oneDNN")) if name in fields]
    parts += [str(fields.get("cpu_capability")), f"numpy {fields.get('numpy')}", str(fields.get("python"))]
    chosen = [f"{name}={value}" for name, value in fields.items() if name.isupper() and name != "CUBLAS_WORKSPACE_CONFIG"]
    fact = ", ".join(part.split(" (Git")[0] for part in parts)
    if chosen:
        return finding(
            "PyTorch",
            f"{fact}; {', '.join(chosen)}",
            note="These variables choose kernels, and so bits: keep them for the whole run and on all hosts, or unset them.",
        )
    return finding("PyTorch", fact)


def determinism(worker: Worker, found: Build) -> Finding:
    """Whether the settings in force give one result."""
    products = "float32 products in full precision"
    if found.matmul_precision != "highest":
        return finding(
            "determinism",
            f"float32 products in reduced precision ({found.matmul_precision})",
            note='Meant so? Else call torch.set_float32_matmul_precision("highest").',
        )
    if worker.device == "cuda":
        config = worker.machine.variables.get("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_DETERMINISTIC[0])
        if config not in _CUBLAS_DETERMINISTIC:
            return finding(
                "determinism",
                f"CUBLAS_WORKSPACE_CONFIG={config}",
                problem="cuBLAS is not deterministic with it: unset it, or set it to :4096:8.",
            )
        if not found.deterministic:
            return finding(
                "determinism",
                "nondeterministic CUDA kernels are allowed",
                problem="Something switches torch.use_deterministic_algorithms off when Python starts: remove it.",
            )
        return finding("determinism", f"deterministic CUDA kernels only, {products}")
    if worker.threads == 1:
        return finding("determinism", f"one thread a worker has one order, {products}")
    return finding("determinism", f"deterministic kernels {'only' if found.deterministic else 'not enforced'}, {products}")


def gpus(worker: Worker, found: Build) -> Finding:
    """GPUs, whether there is one a worker, and how they reach each other."""
    hidden = worker.machine.variables.get("CUDA_VISIBLE_DEVICES")
    if not found.gpus:
        if not found.gpus_present:
            return finding("GPUs", "none: workers compute on the CPU")
        fact = f"{count(found.gpus_present, 'GPU')} here, but PyTorch sees none"
        if hidden is not None:
            return finding("GPUs", f"{fact} (CUDA_VISIBLE_DEVICES={hidden!r})", note="Unset the variable to use them.")
        if found.cuda is None:
            return finding("GPUs", fact, problem="This PyTorch is a CPU build: install one for CUDA.")
        return finding("GPUs", fact, problem=f"Its CUDA {found.cuda} does not go with the driver: update one of them.")
    models = sorted({f"{gpu.name} ({data_size(gpu.memory)})" for gpu in found.gpus})
    fact = f"{len(found.gpus)} x {', '.join(models)}"
    kinds = sorted({link for gpu in found.gpus for link in gpu.links.values()})
    fact += f", links {', '.join(kinds)}" if kinds else ""
    own_only = len(found.gpus) == 1 and worker.device == "cuda"  # each worker may have been shown its own GPU only
    if worker.planned > len(found.gpus) and not own_only:
        return finding(
            "GPUs",
            f"{fact}, for {count(worker.planned, 'worker')}",
            problem=f"One worker a GPU: start {len(found.gpus)} (--workers {len(found.gpus)}), or pass device='cpu' to Trainer.",
        )
    if len(models) > 1:
        return finding("GPUs", fact, problem="Different models give different bits: use GPUs of one model.")
    apart = [number for number, gpu in enumerate(found.gpus) if len(gpu.peers) < len(found.gpus) - 1]
    if apart:
        return finding(
            "GPUs",
            f"{fact}; not all reach each other's memory (GPU {', '.join(map(str, apart))})",
            note="Messages go by the host's memory, which is slower: see nvidia-smi topo -p2p r, and IOMMU or ACS settings.",
        )
    return finding("GPUs", fact)
