"""PyTorch as it is installed here, what is in force for a worker, and the GPUs that it sees. Everything here is *local*."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from unisono.checkpoint.fingerprint import fingerprint
from unisono.doctor.facts import BuildFacts, Gpu

_TOPOLOGY_S = 5.0


def read_build(*, threads: int, device: torch.device) -> BuildFacts:
    """What is installed and in force in this process. *local*

    Args:
        threads: Threads per worker.
        device: The worker's device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = count > 1 and not os.environ.get("CUDA_VISIBLE_DEVICES")
    links = topology(_nvidia_smi()) if several else {}
    present = Path("/proc/driver/nvidia/gpus")
    return BuildFacts(
        fingerprint=fingerprint(threads=threads, device=device),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        matmul_precision=torch.get_float32_matmul_precision(),
        cuda=torch.version.cuda or torch.version.hip,
        gpus=[
            Gpu(
                name=torch.cuda.get_device_name(number),
                memory=torch.cuda.get_device_properties(number).total_memory,
                peers=[other for other in range(count) if other != number and torch.cuda.can_device_access_peer(number, other)],
                links=links.get(number, {}),
            )
            for number in range(count)
        ],
        gpus_present=len(list(present.iterdir())) if present.is_dir() else 0,
    )


def topology(text: str) -> dict[int, dict[str, str]]:
    """The links between GPUs, by number, from the matrix that `nvidia-smi topo -m` prints. *local*"""
    found: dict[int, dict[str, str]] = {}
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()  # it underlines its headings
    heading = next((line.split() for line in lines if "GPU0" in line and not line.startswith("GPU")), [])
    columns = [word for word in heading if re.fullmatch(r"GPU\d+", word)]
    for line in lines:
        row = re.match(r"GPU(\d+)\s+(.*)", line)
        if row is not None and columns:
            cells = dict(zip(columns, row[2].split(), strict=False))
            found[int(row[1])] = {name.removeprefix("GPU"): link for name, link in cells.items() if link != "X"}
    return found


def _nvidia_smi() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_TOPOLOGY_S).stdout
    return ""
