"""What a person does to a terminal while a run trains: reads no further, or closes it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.launch.conftest import LIMIT_S, Launcher, assert_gone

SCRIPT = """
import torch
import unisono

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), index / 64)

def loss(model, batch):
    return model(batch).square().sum(), len(batch)

class Tells(unisono.Callback):
    def on_step(self, trainer, result):
        signal.sigtimedwait([], float(sys.argv[2]))
        if result.step == 3:
            tell(os.getpid())

torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
trainer = unisono.Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch_size=8, run_dir=sys.argv[1], callbacks=[Tells()]
)
trainer.fit(Data(), 4)
"""

ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def summary(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def test_a_run_goes_on_when_nobody_reads_what_it_shows(launcher: Launcher) -> None:
    undisturbed, cut = launcher.folder / "undisturbed", launcher.folder / "cut"
    status, _, err = launcher.run(SCRIPT, str(undisturbed), "0").finish()
    assert (status, err) == (0, "")
    # The end of the first epoch is shown when `head` has long gone.
    command = ["-m", "unisono.launch", "run", "--workers", "2", str(launcher.write(SCRIPT)), str(cut), "0.05"]
    shell = ["bash", "-c", 'set -o pipefail; "$@" | head -n 1', "bash"]
    status, out, err = launcher.command(*command, through=lambda line: [*shell, *line]).finish()
    assert (status, len(out.splitlines()), len(err.splitlines())) == (0, 1, 1)
    assert err.startswith("unisono: standard output takes no more text (Broken pipe): ")
    assert summary(cut)["weights_sha256"] == summary(undisturbed)["weights_sha256"]


def test_a_run_whose_terminal_is_closed_saves_its_work(launcher: Launcher) -> None:
    script, run_dir = launcher.write(SCRIPT), launcher.folder / "run"
    command = ["-m", "unisono.launch", "run", "--workers", "2", str(script), str(run_dir), "0.1"]
    temporary, pipe = launcher.folder / "temporary", launcher.folder / "tell"
    temporary.mkdir()
    os.mkfifo(pipe)
    heard = os.open(pipe, os.O_RDWR)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TELL": str(pipe), "TMPDIR": str(temporary)},
    )
    os.close(theirs)
    told = b""
    while told.count(b"\n") < 2:
        told += os.read(heard, 4096)
    left = [psutil.Process(int(pid)) for pid in told.split()]
    os.close(ours)
    assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
    os.close(heard)
    assert_gone(left)
    said = summary(run_dir)
    assert not said["finished"]
    assert (run_dir / "checkpoints" / f"step-{said['steps']}" / "checkpoint.json").exists()
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
