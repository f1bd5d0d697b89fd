"""Run directories as a training leaves them, without the training, and pictures that an application may attach."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from unisono.report import charts
from unisono.report.attachments import DataTable, TextSample

SHA256 = "009a47db8397f61e9b213edf4850048c8230b24d65293a722729f32d4876e002"
PHASES = ("data", "compute", "communication", "waiting")


def lines(steps: int, *, workers: int = 2, lost_at: int | None = None, seed: int = 0) -> Iterable[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; with ``lost_at`` the last worker is gone after that step."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "epoch": 1 + step // 100, "samples": 64 * step}
        line |= {"loss": 2.5 * math.exp(-step / steps * 4) + draw.random() / 9, "gradient_norm": 0.5 + draw.random()}
        line |= {"samples_per_second": 1000 + draw.random() * 100}
        here = workers - 1 if lost_at is not None and step > lost_at else workers
        times = [
            {
                "data": 0.002,
                "compute": 0.03 * (1.4 if rank == 1 else 1) + draw.random() / 99,
                "communication": 0.004,
                "waiting": 0.0,
            }
            for rank in range(here)
        ]
        longest = max(sum(each.values()) for each in times)
        for rank, each in enumerate(times):
            each["waiting"] = longest - sum(each.values())
            if rank == 0 or step % 3 == 0:
                line |= {f"{name}_s" + (f"_{rank}" if rank else ""): round(value, 6) for name, value in each.items()}
        line |= {"step_s": round(longest + 0.002, 6), "lr": 0.003 * (1 + math.cos(math.pi * step / steps)) / 2}
        yield line
        if step == lost_at:
            reason = f"worker {workers - 1} (pid 4711) was killed by SIGKILL"
            yield {"step": step, "event": "generation", "generation": 2, "workers": workers - 1, "reason": reason}


def evaluations(*steps: int, **metrics: float) -> list[dict[str, Any]]:
    """Lines of evaluations; each metric's values are a tenth more from one to the next."""
    return [
        {"step": step, "event": "evaluation", **{f"metric/{name}": value * 1.1**number for name, value in metrics.items()}}
        for number, step in enumerate(steps)
    ]


def manifest(*, workers: int = 2, planned: int = 60, **settings: Any) -> dict[str, Any]:
    return {
        "unisono": "0.1.0",
        "settings": {
            "batch_size": 64,
            "microbatches": 8,
            "seed": 0,
            "max_grad_norm": 1.0,
            "optimizer": "AdamW",
            "parameter_groups": [{"lr": 0.003, "betas": [0.9, 0.999]}],
            "scheduler": "CosineAnnealingLR",
            "parameters": {"weight": "float32[10, 64]", "bias": "float32[10]", "scale": "float32[]"},
            **settings,
        },
        "fingerprint": {"torch": "2.13.0+cpu", "threads": 1, "device": "cpu"},
        "command": ["train.py", "--epochs", "3", "--run-dir", "runs/one"],
        "started": "2026-11-23T17:45:37+0000",
        "workers": workers,
        "resumed_from_step": None,
        "planned": {"epochs": 3, "steps": planned},
    }


def summary(steps: int, *, workers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "steps": steps,
        "epochs": 3,
        "samples": 64 * steps,
        "samples_per_second": 1050.0,
        "seconds": 0.05 * steps,
        "workers": workers,
        "weights_sha256": SHA256,
        "loss": 0.123456,
        "metrics": {"accuracy": 0.9875},
        "waiting_share": 0.1,
        "finished": True,
        "parameters": 651,
        "run_dir": "runs/one",
        "bytes_sent_per_step": 2604.0,
        "data_s": [0.002 * steps] * workers,
        "compute_s": [0.03 * steps] * workers,
        "communication_s": [0.004 * steps] * workers,
        "waiting_s": [0.006 * steps] * workers,
        "peak_memory_bytes": [4.1e8] * workers,
        "bytes_sent": [2604.0] * workers,
        "microbatches": [8 / workers] * workers,
        **more,
    }


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    workers: int = 2,
    ended: bool = True,
    lost_at: int | None = None,
    extra: Iterable[Mapping[str, Any]] = (),
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    planned: int | None = None,
) -> Path:
    """A run directory with a log, a manifest and, if it has ended, a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    left = workers - (lost_at is not None)
    log = [*lines(steps, workers=workers, lost_at=lost_at, seed=seed), *extra]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "manifest.json").write_text(json.dumps(manifest(workers=workers, planned=planned or steps, **(settings or {}))))
    if ended:
        (folder / "summary.json").write_text(json.dumps(summary(steps, workers=left)))
    return folder


PICTURES: dict[str, Any] = {
    "confusion": charts.confusion_matrix(["cat", "dog"], [[3, 1], [0, 5]]),
    "curves": charts.curves("recall", "precision", {"this run": ([0.0, 1.0], [1.0, 0.5]), "other": ([], [])}),
    "dates": charts.forecast(["2026-01-01", "2026-01-02"], [1.0, 2.0], [0.0, 1.0], [2.0, 3.5], [1.5, float("nan")]),
    "one value": charts.forecast([1.0], [2.0], coverage=0.8),
    "comparison": charts.comparison_bars("RMSE", {"this run": 0.91, "mean": 1.1}, "this run", higher_is_better=False),
    "plotly": go.Figure(
        data=[go.Scatter(x=np.arange(3.0), y=np.array([1.0, np.nan, 3.0]), name="a"), go.Bar(x=[0, 1], y=[2, 3], name="b")],
        layout={"title": {"text": "of its own"}, "width": 2000, "height": 300, "template": "plotly_dark"},
    ),
    "json": {"data": [{"type": "pie", "labels": ["x", "y"], "values": [1, 2]}]},
    "text": TextSample(text="<b>& more\n", prompt="The "),
    "table": DataTable(columns=["film", "stars"], rows=[["Vertigo", 4.5], ["Chinatown", 4]]),
}
