"""Run directories that are named after the time or at random, and models that are made without a seed."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from torch import nn

import unisono
from tests.fault_injection import Death, run_lives
from tests.training.small_run import memory_url
from unisono.checkpoint.store import Store
from unisono.testing import run_threads


def train(workers: Any, run_dir: str, *, seed: int = 0, epochs: int = 8) -> str | None:
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    trainer = unisono.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])),
        batch_size=8,
        microbatches=4,
        checkpoint_every=2,
        run_dir=run_dir,
        collective=workers,
    )
    trainer.fit(torch.utils.data.TensorDataset(torch.ones(24, 4)), epochs)
    return trainer.run_dir


def test_worker_0s_run_directory_is_that_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    urls = [memory_url() for _ in range(3)]
    assert run_threads(3, lambda collective: train(collective, urls[collective.rank])) == [urls[0]] * 3
    assert Store(urls[0]).exists("model.safetensors")
    assert [Store(url).list() for url in urls[1:]] == [[], []]
    assert capsys.readouterr().out.count("the workers were given different run directories") == 1


def test_a_run_directory_of_its_own_resumes_what_worker_0s_holds() -> None:
    url = memory_url()
    run_threads(2, lambda collective: train(collective, url if not collective.rank else memory_url(), epochs=3))
    run_threads(3, lambda collective: train(collective, url if not collective.rank else memory_url()))
    lines = Store(url).read("metrics.jsonl").decode().splitlines()
    assert len(lines) == 24


@pytest.mark.parametrize("death", [20, 45])
def test_who_joins_writes_where_the_others_do_also_when_worker_0_is_lost(death: int) -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    lives = run_lives(2, lambda link: train(link, f"{folder}/{link.membership.me.process.pid}"), {0: Death(death)}, joiners=2)
    assert set(lives.results.values()) == {f"{folder}/0"}
    assert Store(folder).list() == ["0"]
    assert Store(f"{folder}/0").exists("summary.json")


def said(capsys: pytest.CaptureFixture[str], workers: int, seeds: list[int]) -> str:
    url = memory_url()

    def work(collective: Any) -> None:
        train(collective, url, seed=seeds[collective.rank])

    run_threads(workers, work)
    return capsys.readouterr().out


def test_the_same_digest_is_promised_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "you will get the same digest." in said(capsys, 2, [1, 1])
    alone = said(capsys, 1, [1])
    assert "you will get the same digest,\nif the model begins with the same weights" in alone
    with pytest.warns(UserWarning, match="models differ at the start"):
        different = said(capsys, 2, [1, 2])
    assert "you will get the same digest" not in different
    assert "another run ends with another digest" in different
