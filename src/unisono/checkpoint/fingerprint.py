"""What the bits of a run depend on, apart from data and settings: the script, builds, instruction sets, threads, device.

It is stored with each checkpoint and compared on resume. Equal fingerprints do not prove equal bits; different ones are
the first thing to look at when bits differ.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from unisono.errors import FingerprintMismatch

Fingerprint: TypeAlias = dict[str, str | int]

ALGORITHM = 1
"""Raised when unisono itself changes the bits: the tree, the order of samples, seeds, averaging of buffers."""

# Read by the math libraries; they choose kernels or their precision.
_ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY", "CUBLASLT_WORKSPACE_SIZE", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA",
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
# Instruction sets, as Linux names them, for which oneDNN and MKL have kernels of their own.
_INSTRUCTIONS = re.compile(r"fma|avx2|avx512\w+|avx_\w+|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")


def fingerprint(*, threads: int, device: torch.device) -> Fingerprint:
    """What the bits of a run on `device` depend on and this process can read, by field name. *local*

    Args:
        threads: Threads per worker.
        device: The worker's device; only its type and model count, not its number.
    """
    return {
        "script": _script(),
        "algorithm": ALGORITHM,
        "torch": str(torch.__version__),  # a subclass of str
        "torch_git": str(torch.version.git_version),
        "python": f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}",
        "numpy": np.__version__,
        **_math_libraries(torch.__config__.show()),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **_cpu(),
        "threads": threads,
        "device": device.type,
        **(_cuda(device) if device.type == "cuda" else {}),
        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def _script() -> str:
    """Digest of the script that runs, as far as there is a file; modules that it imports are not looked at."""
    try:
        return hashlib.blake2b(Path(sys.argv[0]).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""


def compare(old: Mapping[str, str | int], new: Mapping[str, str | int]) -> list[str]:
    """Readable differences, one a field, for example "threads: 2 at the checkpoint, 1 now". *local*"""
    return [
        f"{field}: {old.get(field, 'not set')} at the checkpoint, {new.get(field, 'not set')} now"
        for field in _differing(old, new)
    ]


def check(old: Mapping[str, str | int], new: Mapping[str, str | int], *, strict: bool) -> None:
    """Warns once if the fingerprint of the checkpoint, `old`, is not the present one, `new`. *local*

    Raises:
        FingerprintMismatch: They differ and `strict` is True.
    """
    differences = compare(old, new)
    if not differences:
        return
    message = (
        f"what this run depends on has changed since its checkpoint ({'; '.join(differences)}), so from here on the bits may "
        "differ from those of a run without this change. "
    )
    if strict:
        raise FingerprintMismatch(message + "Restore what changed, or resume with strict=False.", fields=_differing(old, new))
    warnings.warn(message + "Restore what changed if they must not; strict=True makes this an error.", stacklevel=2)


def _differing(old: Mapping[str, str | int], new: Mapping[str, str | int]) -> list[str]:
    # The order of the present fingerprint, then what only the old one has.
    return [field for field in {**new, **old} if old.get(field) != new.get(field)]


def _math_libraries(config: str) -> Fingerprint:
    """Builds of the libraries that torch was built with, from the text of `torch.__config__.show()`."""
    patterns = {
        "mkl": r"Math Kernel Library Version (\S+)",
        "mkldnn": r"MKL-DNN (v\S+ \(Git Hash \w+\)|v\S+)",
        "openmp": r"OpenMP (\d+)",
        "blas": r"BLAS_INFO=(\w+)",
    }
    found = {name: re.search(pattern, config) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def _cpu() -> Fingerprint:
    """Vendor and instruction sets of the processor, where Linux tells: finer than torch's own capability."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    # One block for each core, all alike.
    lines = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    flags = str(lines.get("flags") or lines.get("Features") or "").split()
    return {
        "cpu_vendor": lines.get("vendor_id") or lines.get("CPU implementer") or "unknown",
        "cpu_instructions": " ".join(sorted(flag for flag in flags if _INSTRUCTIONS.fullmatch(flag))),
    }


def _cuda(device: torch.device) -> Fingerprint:
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "gpu_capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
