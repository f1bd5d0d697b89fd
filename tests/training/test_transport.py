"""Which transport the workers of a launch get, and that nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch, unisono
from torch import nn

if "forbidden" in sys.argv and os.environ["RANK"] == "1":
    del os.memfd_create  # a kernel without it, on one of the workers

def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).sum(), batch[0].numel()

torch.manual_seed(0)
model = nn.Linear(400, 400)
data = torch.utils.data.TensorDataset(torch.randn(24, 400), torch.randn(24, 400))
trainer = unisono.Trainer(model, torch.optim.Adam(model.parameters()), loss, batch_size=12, microbatches=4)
for batch in trainer.batches(data, epochs=2):
    trainer.step(batch)
if trainer.world.is_main:
    print(type(trainer.collective).__name__, trainer.collective.size, model.weight.double().sum().item())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def launch(workers: int, script: Path, *arguments: str) -> tuple[list[str], str]:
    """What worker 0 said about itself, and what stood on standard error."""
    command = [sys.executable, "-m", "unisono.launch", "run", "--workers", str(workers), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split(), done.stderr


def test_workers_of_one_host_share_memory_and_leave_nothing_behind(script: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    (transport, size, total), _ = launch(3, script)
    (_, _, alone), _ = launch(1, script)

    assert (transport, size) == ("SharedMemory", "3")
    assert total == alone
    assert not set(Path("/dev/shm").iterdir()) - before


def test_where_one_worker_cannot_share_memory_all_use_gloo_and_say_so_once(script: Path) -> None:
    (transport, size, total), said = launch(2, script, "forbidden")
    (_, _, alone), _ = launch(1, script)

    assert (transport, size) == ("TorchDistributed", "2")
    assert total == alone
    assert said.count("workers talk over Gloo, since they cannot share memory") == 1
