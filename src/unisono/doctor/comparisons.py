"""Facts about links, clocks, the run directory and several hosts -> findings. Pure functions of the facts, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from unisono.doctor.facts import Examination, Links, Pair
from unisono.doctor.findings import Finding, finding
from unisono.observe.formats import data_size

_LOW_SHARE = 0.5
_SLOW_NETWORK = 125e6  # what Ethernet of 1 Gbit/s carries
_SLOW_BARRIER_S = {"shared memory": 1e-3, "Gloo": 10e-3}
_UNEVEN = 2.0
_CLOCK_NOTE_S, _CLOCK_PROBLEM_S = 0.05, 5.0
_LITTLE_FREE, _TOO_LITTLE_FREE = 2e9, 100e6
_SLOW_RATE, _SLOW_SMALL_S = 20e6, 0.1


def check_together(examination: Examination) -> list[Finding]:
    """What the facts mean that are about no single host. *local*"""
    if not examination.failure:
        return [*transports(examination), clocks(examination), run_directory(examination), *differences(examination)]
    advice = (
        "A run would fail in the same way. If they do not find each other: GLOO_SOCKET_IFNAME names the network "
        "interface, the hosts must reach each other on all ports, and all must start within a minute."
    )
    failed = finding("workers", examination.failure, problem=advice)
    return [failed, *transports(examination), *differences(examination)]


def transports(examination: Examination) -> list[Finding]:
    """What each transport does; for the first, which a run would use, what may be wrong with it."""
    findings: list[Finding] = []
    for links in examination.links:
        if not links.pairs:
            continue
        in_use = links is examination.links[0]
        rate, small_s = min(pair.large_rate for pair in links.pairs), max(pair.small_s for pair in links.pairs)
        size = min(pair.large_bytes for pair in links.pairs)
        fact = f"barrier {_time(links.barrier_s)}, 64 KiB {_time(small_s)}, {size / 2**20:.0f} MiB at {_rate(rate)} each way"
        if links.transport == "shared memory" and examination.copy_rate:
            fact += f", {rate / examination.copy_rate:.0%} of what a core copies ({_rate(examination.copy_rate)})"
        if links.transport == "Gloo" and not in_use:
            fact += "; used between hosts, and where memory cannot be shared"
        findings.append(finding(links.transport, fact, note=" ".join(_notes(links, rate, examination)) if in_use else ""))
    return findings


def _notes(links: Links, rate: float, examination: Examination) -> list[str]:
    """What is to be said about the transport that a run would use, whose slowest pair has this rate."""
    notes: list[str] = []
    if examination.no_shared_memory:
        notes.append(
            f"The workers of this host cannot share memory ({examination.no_shared_memory}), which is several times faster: they "
            "must be in one network namespace and of one user, and memfd_create must be allowed."
        )
    if links.transport == "shared memory" and rate < _LOW_SHARE * (examination.copy_rate or 0.0):
        notes.append(f"Slow beside what a core copies ({_rate(examination.copy_rate or 0.0)}): are the cores otherwise busy?")
    if links.transport == "Gloo" and rate < _SLOW_NETWORK:
        notes.append("Slow for a network: does GLOO_SOCKET_IFNAME name the fastest one?")
    if links.barrier_s > _SLOW_BARRIER_S.get(links.transport, float("inf")):
        notes.append("A barrier takes long, and a step needs three: more threads than cores, or a slow network.")
    return notes + _uneven(links, examination)


def _uneven(links: Links, examination: Examination) -> list[str]:
    """Pairs that are far slower than the others of their kind (within a host, between hosts)."""
    host = {worker.rank: worker.host for worker in examination.workers}
    kinds: dict[bool, list[Pair]] = {}
    for pair in links.pairs:
        kinds.setdefault(host[pair.first] == host[pair.second], []).append(pair)
    notes: list[str] = []
    for pairs in kinds.values():
        usual = statistics.median(pair.large_rate for pair in pairs)
        slowest = min(pairs, key=lambda pair: pair.large_rate)
        if slowest.large_rate * _UNEVEN < usual:
            notes.append(
                f"Workers {slowest.first} ({host[slowest.first]}) and {slowest.second} ({host[slowest.second]}) exchange "
                f"{_rate(slowest.large_rate)}, the others {_rate(usual)}: every step waits for the slowest pair."
            )
    return notes


def clocks(examination: Examination) -> Finding:
    """Whether the hosts agree on the time."""
    if len(examination.hosts) == 1:
        return finding("clocks", "one host: nothing to compare")
    offsets = {worker.host: offset for worker, offset in zip(examination.workers, examination.clock_offsets, strict=True)}
    host, offset = max(offsets.items(), key=lambda item: abs(item[1]))
    fact = f"{host} is {_time(abs(offset))} {'ahead of' if offset > 0 else 'behind'} {examination.workers[0].host}"
    advice = f"Failures are ordered and files dated by these clocks: let {host} set its clock by NTP (chrony, systemd-timesyncd)."
    return finding(
        "clocks",
        fact + (", the other hosts less" if len(offsets) > 2 else ""),
        problem=f"{advice} Object stores and TLS refuse clocks that are minutes wrong."
        if abs(offset) >= _CLOCK_PROBLEM_S
        else "",
        note=advice if abs(offset) >= _CLOCK_NOTE_S else "",
    )


def run_directory(examination: Examination) -> Finding:
    """Whether checkpoints can be written, how fast, and whether all workers see them."""
    name, found = "run directory", examination.storage
    if found is None:
        return finding(name, "not examined")
    if found.error:
        return finding(name, f"{found.url}: {found.error}", problem="Make it usable, or choose another one (--run-dir).")
    rate, small_s = found.rate or 0.0, found.small_s or 0.0
    free = "free space unknown" if found.free is None else f"{data_size(found.free)} free"
    fact = f"{found.url}: {_rate(rate)}, a small file {_time(small_s)}, {free}"
    if found.blind:
        blind = ", ".join(f"{rank} ({examination.workers[rank].host})" for rank in found.blind[:5])
        return finding(
            name,
            f"{fact}; what worker 0 writes is not seen by worker {blind}",
            problem="All workers need the same directory: one on a shared file system or object store (--run-dir).",
        )
    if found.free is not None and found.free < _TOO_LITTLE_FREE:
        return finding(name, fact, problem="Too little for checkpoints: free space, or choose another directory (--run-dir).")
    notes: list[str] = []
    if found.free is not None and found.free < _LITTLE_FREE:
        notes.append("Checkpoints hold model and optimizer state several times (keep=): is there room?")
    if rate < _SLOW_RATE or small_s > _SLOW_SMALL_S:
        notes.append("Slow: checkpoint rarely (checkpoint_every), or choose another directory.")
    return finding(name, fact, note=" ".join(notes))


def differences(examination: Examination) -> list[Finding]:
    """What is not the same everywhere: builds (the bits depend on them) and sizes (the slowest host sets the pace)."""
    findings: list[Finding] = []
    builds = [(worker.host, worker.build.fingerprint) for worker in examination.workers if worker.build is not None]
    fields = dict.fromkeys(name for _, fingerprint in builds for name in fingerprint)
    unequal = [name for name in fields if len({fingerprint.get(name) for _, fingerprint in builds}) > 1]
    if unequal:
        fact = "; ".join(_who_has_what(name, builds) for name in unequal)
        advice = (
            "The bits depend on who computes what: install the same builds and set the same variables everywhere, on machines "
        )
        findings.append(finding("same build", fact, problem=f"{advice}of one kind."))
    if len(examination.hosts) == 1:
        return findings
    if not unequal:
        findings.append(finding("same build", f"{len(builds)} workers on {len(examination.hosts)} hosts have one fingerprint"))
    firsts = {host: workers[0] for host, workers in examination.hosts.items()}
    sizes = {
        "cores": {host: f"{worker.machine.usable_cores:g}" for host, worker in firsts.items()},
        "workers": {host: str(worker.planned) for host, worker in firsts.items()},
        "memory": {host: data_size(worker.machine.memory) for host, worker in firsts.items()},
    }
    for name, values in sizes.items():
        if len(set(values.values())) > 1:
            fact = f"{name}: " + ", ".join(f"{value} on {host}" for host, value in values.items())
            findings.append(finding("same hosts", fact, note="The weakest host sets the pace of every step."))
    return findings


def _who_has_what(field: str, builds: Sequence[tuple[str, dict[str, str | int]]]) -> str:
    hosts: dict[str, list[str]] = {}
    for host, fingerprint in builds:
        hosts.setdefault(str(fingerprint.get(field, "not set")), []).append(host)
    texts = [f"{_short(value)} on {', '.join(dict.fromkeys(where))}" for value, where in hosts.items()]
    return f"{field} differs: {', '.join(texts)}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _rate(bytes_per_second: float) -> str:
    return f"{data_size(bytes_per_second)}/s"
