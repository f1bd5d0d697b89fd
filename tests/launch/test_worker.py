"""Scripts that end themselves in the middle of training, some of them or all."""

from __future__ import annotations

import pytest

from tests.launch.conftest import Launch, Launcher

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

first = rank

class Ends(unisono.Callback):
    def on_step(self, trainer, result):
        if trainer.world.attempt == 0 and result.step == 2 and first in {quitters}:
            sys.exit()
        if trainer.world.attempt == 0 and result.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
trainer = unisono.Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch_size=8, run_dir=sys.argv[1], callbacks=[Ends()]
)
trainer.fit(Data(), 1)
tell("trained", trainer.position.step)
"""


def run(launcher: Launcher, quitters: set[int], workers: int = 2) -> Launch:
    return launcher.run(SCRIPT.replace("{quitters}", str(quitters)), str(launcher.folder / "run"), workers=workers)


def test_a_script_that_ends_itself_on_one_worker_ends_the_run_for_nobody_else(launcher: Launcher) -> None:
    launch = run(launcher, {1})
    assert launch.hear() == ["trained", "8"]
    status, _, err = launch.finish()
    assert status == 0
    assert "was killed by SIGKILL" in err
    assert (launcher.folder / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_script_that_ends_itself_on_all_workers_ends_the_run(launcher: Launcher, workers: int) -> None:
    launch = run(launcher, {0, 1, 2}, workers)
    status, _, err = launch.finish()
    assert (status, "SIGKILL" in err) == (0, False)
    assert not (launcher.folder / "run" / "model.safetensors").exists()
