"""Which transport the workers of a launch get, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import Launcher, launcher
from unisono.system.fork_server import ForkServer

__all__ = ["launcher"]  # a fixture, which pytest finds by its name

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


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transport") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def alone(script: Path, tmp_path_factory: pytest.TempPathFactory, warm_commands: ForkServer | None) -> str:
    """The sum of the weights that one worker ends with."""
    with contextlib.closing(Launcher(tmp_path_factory.mktemp("alone"), warm_commands)) as launcher:
        (_, _, total), _ = launch(launcher, 1, script)
    return total


def launch(launcher: Launcher, workers: int, script: Path, *arguments: str) -> tuple[list[str], str]:
    """What worker 0 said about itself, and what stood on standard error."""
    command = launcher.command("-m", "unisono.launch", "run", "--workers", str(workers), str(script), *arguments)
    status, out, err = command.finish()
    assert status == 0, out + err
    return out.split(), err


@pytest.mark.alone
def test_workers_of_one_host_share_memory_and_leave_nothing_behind(launcher: Launcher, script: Path, alone: str) -> None:
    before = set(Path("/dev/shm").iterdir())
    (transport, size, total), _ = launch(launcher, 3, script)

    assert (transport, size) == ("SharedMemory", "3")
    assert total == alone
    assert not set(Path("/dev/shm").iterdir()) - before


def test_where_one_worker_cannot_share_memory_all_use_gloo_and_say_so_once(launcher: Launcher, script: Path, alone: str) -> None:
    (transport, size, total), said = launch(launcher, 2, script, "forbidden")

    assert (transport, size) == ("TorchDistributed", "2")
    assert total == alone
    assert said.count("workers talk over Gloo, since they cannot share memory") == 1


# ---- nothing is left, however a run ends ----

ENDLESS = """
import os, signal, sys
import torch, unisono
from torch import nn

class Ends(unisono.Callback):
    edits_weights = False

    def on_step(self, trainer, result):
        if result.step == 1 and trainer.collective.rank == 0:
            print("trains", type(trainer.collective).__name__, flush=True)
        if result.step < 3:
            return
        if "exception" in sys.argv and trainer.collective.rank == 1:
            raise KeyError("mine")
        if "one killed" in sys.argv and trainer.collective.size == 1:
            sys.exit()  # the last one that is left
        if "one killed" in sys.argv and trainer.collective.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if "all killed" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stop" in sys.argv and trainer.collective.rank == 0 and result.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
data = torch.utils.data.TensorDataset(torch.randn(24, 400))
trainer = unisono.Trainer(
    model,
    torch.optim.Adam(model.parameters()),
    lambda model, batch: model(batch[0]).square().mean(),
    batch_size=12,
    microbatches=4,
    callbacks=[Ends()],
)
trainer.fit(data, epochs=10_000 if len(sys.argv) > 1 else 3)
"""


def named_shared_memory() -> set[str]:
    """What a file system would keep: files under /dev/shm, and Unix sockets with an abstract name."""
    sockets = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@unisono-" in line}
    return {str(path) for path in Path("/dev/shm").iterdir()} | sockets


@pytest.mark.alone
@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("exception", 1), ("stop", 130), ("one killed", 0), ("all killed", 128 + 9)]
)
def test_nothing_is_left_however_a_run_ends(launcher: Launcher, end: str, status: int) -> None:
    before = named_shared_memory()

    options = ("--max-restarts", "0")  # else each newcomer would end as its predecessor did
    found, out, err = launcher.run(ENDLESS, *([end] if end else []), workers=3, options=options).finish()

    assert found == status, out + err
    assert "trains SharedMemory" in out
    deadline = time.monotonic() + 5
    left = named_shared_memory() - before
    while left and time.monotonic() < deadline:  # another run of this machine may just be meeting
        left &= named_shared_memory()
    assert left == set()


def test_a_tiny_dev_shm_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "endless.py"
    path.write_text(ENDLESS)
    run = f"{sys.executable} -m unisono.launch run --workers 2 {path}"
    small = f"mount -t tmpfs -o size=4k tmpfs /dev/shm && exec {run}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", small], capture_output=True, text=True, timeout=100, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace of its own here: {done.stderr.strip()}")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "trains SharedMemory" in done.stdout
