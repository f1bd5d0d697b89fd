"""What a person does to a terminal while a run trains: reads no further, or closes it."""

from __future__ import annotations

import json
import os
import pty
import signal
from pathlib import Path

from tests.launch.conftest import Launcher, assert_gone

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


def summary(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def test_a_run_goes_on_when_nobody_reads_what_it_shows(launcher: Launcher) -> None:
    undisturbed, cut = launcher.folder / "undisturbed", launcher.folder / "cut"
    status, _, err = launcher.run(SCRIPT, str(undisturbed), "0").finish()
    assert (status, err) == (0, "")
    # The end of the first epoch is shown when nobody has been reading for long.
    launch = launcher.run(SCRIPT, str(cut), "0.05")
    assert launch.hang_up().count("\n") == 1
    status, _, err = launch.finish()
    assert (status, len(err.splitlines())) == (0, 1)
    assert err.startswith("unisono: standard output cannot be written to (Broken pipe): ")
    assert summary(cut)["weights_sha256"] == summary(undisturbed)["weights_sha256"]


def test_a_run_whose_terminal_is_closed_saves_its_work(launcher: Launcher) -> None:
    script, run_dir = launcher.write(SCRIPT), launcher.folder / "run"
    ours, theirs = pty.openpty()
    command = ["-m", "unisono.launch", "run", "--workers", "2", str(script), str(run_dir), "0.1"]
    launch = launcher.command(*command, terminal=theirs)
    os.close(theirs)
    workers = launch.hear_processes(2)
    os.close(ours)
    assert launch.finish()[0] == 128 + signal.SIGTERM
    assert_gone(workers)
    said = summary(run_dir)
    assert not said["finished"]
    assert (run_dir / "checkpoints" / f"step-{said['steps']}" / "checkpoint.json").exists()
    assert not [path for path in launch.temporary.iterdir() if not path.name.startswith("torchinductor")]
