"""Facts about links, clocks, the run directory and several hosts -> findings. Pure functions of the facts, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from unisono.doctor.findings import Finding, finding
from unisono.doctor.records import Examination, Links, Pair
from unisono.observe.formats import data_size

_LOW_SHARE = 0.5
_SLOW_BARRIER_S = {"shared memory": 1e-3, "Gloo": 10e-3}
_UNEVEN = 2.0
_CLOCK_NOTE_S, _CLOCK_PROBLEM_S = 0.05, 5.0
_LITTLE_FREE, _TOO_LITTLE_FREE = 2e9, 100e6
_SLOW_RATE, _SLOW_SMALL_S = 20e6, 0.1


def check_together(examination: Examination) -> list[Finding]:
    """What the facts mean that are about no single host. *local*"""
    findings: list[Finding] = []
    if examination.failure:
        findings.append(
            finding(
                "workers",
                examination.failure,
                problem="A run would fail in the same way. If they do not find each other: GLOO_SOCKET_IFNAME names the network "
                "interface, the hosts must reach each other on all ports, and all must start within a minute.",
            )
        )
    findings += transports(examination)
    findings += [check(examination) for check in (clocks, run_directory) if not examination.failure]
    findings += differences(examination)
    return findings


def transports(examination: Examination) -> list[Finding]:
    """What each transport does, beside what the hardware allows."""
    findings: list[Finding] = []
    for position, links in enumerate(examination.links):
        if not links.pairs:
            continue
        rate, small_s = min(pair.large_rate for pair in links.pairs), max(pair.small_s for pair in links.pairs)
        fact = (
            f"barrier {_time(links.barrier_s)}, 64 KiB {_time(small_s)}, "
            f"{min(pair.large_bytes for pair in links.pairs) / 2**20:.0f} MiB at {_rate(rate)} each way"
        )
        share, measure = _share(links, examination)
        fact += f", {share:.0%} of {measure}" if share is not None else ""
        notes = _notes(links, share, measure, examination) if position == 0 else []
        if links.transport == "Gloo":
            fact += "" if position == 0 else "; used between hosts, and where memory cannot be shared"
        findings.append(finding(links.transport, fact, note=" ".join(notes)))
    return findings


def _share(links: Links, examination: Examination) -> tuple[float | None, str]:
    """How much of what the hardware allows the worst pair reaches, and what that is."""
    if links.transport == "shared memory" and examination.copy_rate:
        copy = examination.copy_rate
        rate = min(pair.large_rate for pair in links.pairs)
        return rate / copy, f"what a core copies ({_rate(copy)})"
    if links.transport == "Gloo" and examination.streams:
        plain = {(pair.first, pair.second): pair.large_rate for pair in examination.streams.pairs}
        shares = [(p.large_rate / plain[key], plain[key]) for p in links.pairs if (key := (p.first, p.second)) in plain]
        if shares:
            share, rate = min(shares)
            return share, f"plain TCP ({_rate(rate)})"
    return None, ""


def _notes(links: Links, share: float | None, measure: str, examination: Examination) -> list[str]:
    """What is to be said about the transport that a run would use."""
    notes: list[str] = []
    if examination.no_shared_memory:
        notes.append(
            f"The workers of this host cannot share memory ({examination.no_shared_memory}), which is several times faster: they "
            "must be in one network namespace and of one user, and memfd_create must be allowed."
        )
    if share is not None and share < _LOW_SHARE:
        notes.append(
            f"Slow beside {measure}: are the cores busy with something else?"
            if links.transport == "shared memory"
            else f"Slow beside {measure}: does GLOO_SOCKET_IFNAME name the fastest network?"
        )
    limit_s = _SLOW_BARRIER_S.get(links.transport)
    if limit_s is not None and links.barrier_s > limit_s:
        notes.append("A barrier takes long, and a step needs three: more threads than cores, or a slow network.")
    notes += _uneven(links, examination)
    missing = _unconnected(examination)
    if missing:
        pairs = ", ".join(f"{first}-{second}" for first, second in missing[:5])
        notes.append(f"No plain TCP connection between workers {pairs}: a firewall, or the wrong interface?")
    return notes


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


def _unconnected(examination: Examination) -> list[tuple[int, int]]:
    if examination.streams is None or not examination.links:
        return []
    plain = {(pair.first, pair.second) for pair in examination.streams.pairs}
    return [key for pair in examination.links[-1].pairs if (key := (pair.first, pair.second)) not in plain]


def clocks(examination: Examination) -> Finding:
    """Whether the hosts agree on the time."""
    if len(examination.hosts) == 1:
        return finding("clocks", "one host: nothing to compare")
    off = {worker.host: offset for worker, offset in zip(examination.workers, examination.clock_offsets, strict=True)}
    host = max(off, key=lambda name: abs(off[name]))
    direction = "ahead of" if off[host] > 0 else "behind"
    fact = f"{host} is {_time(abs(off[host]))} {direction} {examination.workers[0].host}"
    fact += ", the other hosts less" if len(off) > 2 else ""
    advice = f"Failures are ordered and files dated by these clocks: let {host} set its clock by NTP (chrony, systemd-timesyncd)."
    if abs(off[host]) >= _CLOCK_PROBLEM_S:
        return finding("clocks", fact, problem=advice + " Object stores and TLS refuse clocks that are minutes wrong.")
    return finding("clocks", fact, note=advice if abs(off[host]) >= _CLOCK_NOTE_S else "")


def run_directory(examination: Examination) -> Finding:
    """Whether checkpoints can be written, how fast, and whether all workers see them."""
    found = examination.storage
    if found is None:
        return finding("run directory", "not examined")
    name = "run directory"
    if found.error:
        return finding(name, f"{found.url}: {found.error}", problem="Make it usable, or choose another one (--run-dir).")
    free = "free space unknown" if found.free is None else f"{data_size(found.free)} free"
    fact = f"{found.url}: {_rate(found.rate or 0)}, a small file {_time(found.small_s or 0)}, {free}"
    if found.blind:
        host = {worker.rank: worker.host for worker in examination.workers}
        blind = ", ".join(f"{rank} ({host[rank]})" for rank in found.blind[:5])
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
    if (found.rate or 0) < _SLOW_RATE or (found.small_s or 0) > _SLOW_SMALL_S:
        notes.append("Slow: checkpoint rarely (checkpoint_every), or choose another directory.")
    return finding(name, fact, note=" ".join(notes))


def differences(examination: Examination) -> list[Finding]:
    """What is not the same everywhere: builds (the bits depend on them) and sizes (the slowest host sets the pace)."""
    findings: list[Finding] = []
    builds = [(worker.host, worker.build.fingerprint) for worker in examination.workers if worker.build is not None]
    fields = dict.fromkeys(name for _, fingerprint in builds for name in fingerprint)
    unequal = [name for name in fields if len({fingerprint.get(name) for _, fingerprint in builds}) > 1]
    if unequal:
        findings.append(
            finding(
                "same build",
                "; ".join(_who_has_what(name, builds) for name in unequal),
                problem="The bits depend on who computes what: install the same builds and set the same variables everywhere, on "
                "machines of one kind.",
            )
        )
    if len(examination.hosts) == 1:
        return findings
    if not unequal:
        findings.append(finding("same build", f"{len(builds)} workers on {len(examination.hosts)} hosts have one fingerprint"))
    firsts = {host: workers[0] for host, workers in examination.hosts.items()}
    sizes: list[tuple[str, dict[str, str]]] = [
        ("cores", {host: f"{worker.machine.usable_cores:g}" for host, worker in firsts.items()}),
        ("workers", {host: str(worker.planned) for host, worker in firsts.items()}),
        ("memory", {host: data_size(worker.machine.memory or 0) for host, worker in firsts.items()}),
    ]
    for name, values in sizes:
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


def matrix(links: Links, size: int, cell: Callable[[Pair], str]) -> list[list[str]]:
    """A row for each worker, with what lies between it and each other one. *local*"""
    table = [["" for _ in range(size)] for _ in range(size)]
    for pair in links.pairs:
        table[pair.first][pair.second] = table[pair.second][pair.first] = cell(pair)
    return table


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _rate(bytes_per_second: float) -> str:
    return f"{data_size(bytes_per_second)}/s"
