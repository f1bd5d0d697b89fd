"""The plain loop tells callbacks what the trainer tells them, when it tells them."""

from __future__ import annotations

from pathlib import Path

from tests.verify.test_inquiry import PRELUDE
from unisono.verify.inquiry import inquire
from unisono.verify.servers import ForkServers

SLOWS_DOWN = """
class SlowsDown(unisono.Callback):
    def on_epoch(self, trainer, epoch):
        trainer.evaluate(data, {"error": loss})

    def on_evaluate(self, trainer, results):
        assert list(results) == ["error"] and trainer.position.step == 2, (results, trainer.position)
        for group in trainer.optimizer.param_groups:
            group["lr"] /= 4

trainer(callbacks=[SlowsDown()]).fit(data, 2)
"""


def test_a_callback_that_acts_on_an_evaluation_acts_in_the_plain_loop_too(tmp_path: Path, servers: ForkServers) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + SLOWS_DOWN)
    report = inquire(str(script), workers=(2,), steps=3, servers=servers)
    assert (report.problem, report.verdict, report.causes) == ("", "equal", ())
    assert report.reference is not None
    assert (report.reference.problem, report.reference.beyond) == ("", ())
