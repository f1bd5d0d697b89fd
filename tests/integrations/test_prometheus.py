from __future__ import annotations

import gc
import sys
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

import unisono
from tests.training.small_run import STEPS_PER_EPOCH, Augmented, loss, make_trainer
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.testing import run_threads


def read(port: int) -> dict[tuple[str, str], float]:
    """Values by name and label."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_run_can_be_scraped_while_it_trains() -> None:
    seen: list[dict[tuple[str, str], float]] = []
    ports: list[int] = []

    class Scraper(unisono.Callback):
        def __init__(self, served: unisono.Prometheus) -> None:
            self.served = served

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if trainer.collective.rank == 0:
                seen.append({**read(self.served.port), ("expected", ""): result.loss})

    def work(collective: Collective) -> None:
        served = unisono.Prometheus(0)
        make_trainer(collective, callbacks=[served, Scraper(served)]).fit(Augmented(), 1)
        ports.append(served.port)

    run_threads(2, work)
    assert len(seen) == STEPS_PER_EPOCH
    assert sorted(port == 0 for port in ports) == [False, True]  # worker 0 alone listens
    last = seen[-1]
    assert last["unisono_loss", ""] == last["expected", ""]
    assert last["unisono_step", ""] == STEPS_PER_EPOCH
    assert last["unisono_samples_total", ""] == 32
    assert last["unisono_workers", ""] == 2
    assert last["unisono_learning_rate", "1"] > 0
    seconds = [last["unisono_seconds_total", name] for name in ("data", "compute", "communication", "waiting", "other")]
    assert min(seconds) >= 0
    assert sum(seconds) > 0
    gc.collect()
    with pytest.raises(URLError):  # it ends with its callback
        read(max(ports))


def test_evaluations_can_be_scraped() -> None:
    served = unisono.Prometheus(0)
    trainer = make_trainer(callbacks=[served])
    before = trainer.evaluate(Augmented(), {"loss": loss, "half": lambda model, batch: (1, 2)})
    assert read(served.port)["unisono_evaluation", "loss"] == before["loss"]
    trainer.fit(Augmented(), 1)
    after = trainer.evaluate(Augmented())
    found = read(served.port)
    assert before["loss"] != after["loss"] == found["unisono_evaluation", "loss"]
    assert found["unisono_evaluation_step", "loss"] == STEPS_PER_EPOCH
    assert (found["unisono_evaluation", "half"], found["unisono_evaluation_step", "half"]) == (0.5, 0)


def test_a_port_that_is_taken_is_said() -> None:
    first = unisono.Prometheus(0)
    trainer = make_trainer(callbacks=[first])
    trainer.fit(Augmented(), 1)
    with pytest.raises(ConfigurationError, match=f"cannot listen at 127.0.0.1:{first.port} .* Choose another port"):
        make_trainer(callbacks=[unisono.Prometheus(first.port)]).fit(Augmented(), 1)


def test_a_missing_package_or_a_wrong_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="port=70000"):
        unisono.Prometheus(70000)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unisono\[prometheus\]'"):
        unisono.Prometheus(0)
