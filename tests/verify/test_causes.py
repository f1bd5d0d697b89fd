"""Every planted fault is found and named, with the line that makes it where a line makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from unisono.verify.inquiry import VerifyReport, inquire
from unisono.verify.servers import ForkServers

FAULTS = Path(__file__).parent / "faults"
STEPS = 3

# Name of the script: verdict, cause, a word of the line that is shown (or of the description, where no line makes it).
EXPECTED = {
    "batch_norm": ("equal", "batch_norm", "GroupNorm"),
    "buffer_by_rank": ("different", "buffer_on_some_workers", 'os.environ.get("RANK", "0") == "0"'),
    "callback_edits_weights": ("different", "callback_on_some_workers", "on worker 0 only"),
    "counter_in_loss": ("different", "state_between_batches", "calls"),
    "dataset_mutates": ("different", "dataset_keeps_state", "inputs"),
    "dropout_by_rank": ("different", "own_seeding", "torch.manual_seed(100"),
    "frozen_on_one_rank": ("different", "rank_dependent", 'if os.environ.get("RANK", "0") == "1"'),
    "hidden_state": ("different", "state_between_batches", "model.hidden"),
    "in_batch_negatives": ("equal", "samples_coupled", "WholeBatchLoss(embed, loss)"),
    "init_after_trainer": ("different", "own_seeding", "torch.manual_seed(trainer.world.rank)"),
    "init_by_rank": ("equal", "models_differ", "from_environment().rank"),
    "loss_divided_twice": ("different", "loss_divided_twice", "/ MICROBATCHES, len(labels)"),
    "mean_with_count": ("different", "mean_with_count", 'reduction="sum"'),
    "metric_over_workers": ("different", "combined_over_workers", "workers.all_gather(hits"),
    "noise_by_loader_worker": ("different", "loader_worker", "num_workers=0"),
    "nondeterministic_kernel": ("different", "nondeterministic_kernel", "use_deterministic_algorithms(False)"),
    "numpy_in_dataset": ("different", "dataset_keeps_state", "rng"),
    "random_in_forward": ("different", "python_random_in_forward", "draws from random"),
    "rank_branch": ("different", "rank_dependent", 'if os.environ.get("RANK", "0") != "0"'),
    "rate_by_world_size": ("different", "settings_by_workers", "lr=0.1 * int("),
    "scheduler_twice": ("different", "scheduler_stepped_twice", "scheduler.step()"),
    "set_order": ("different", "set_order", "order of a set"),
    "thread_count": ("different", "thread_count", "torch.set_num_threads(2 if"),
    "time_seed": ("different", "clock", "int(time.time())"),
    "token_mean": ("different", "mean_over_ragged_counts", "weighs"),
    "unseeded": ("different", "unseeded", "nobody seeded"),
}


def verified(name: str, servers: ForkServers) -> VerifyReport:
    # Three workers do not divide eight microbatches, and one of them is in the middle.
    counts = {"metric_over_workers": (2, 3), "nondeterministic_kernel": (2,)}.get(name, (3,))
    threads = 2 if name == "nondeterministic_kernel" else 1
    return inquire(str(FAULTS / f"{name}.py"), workers=counts, steps=STEPS, threads=threads, servers=servers)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_planted_fault_is_found_and_named(name: str, servers: ForkServers) -> None:
    verdict, cause, word = EXPECTED[name]
    report = verified(name, servers)
    assert report.problem == ""
    assert (report.verdict, [found.name for found in report.causes]) == (verdict, [cause])
    (found,) = report.causes
    assert word in " ".join([found.what, found.advice, *found.places])
    assert found.experiments, "no cause without an experiment"


def test_a_loss_over_the_whole_batch_is_what_the_plain_loop_computes(servers: ForkServers) -> None:
    script = Path(__file__).parent / "ordinary" / "contrastive.py"
    report = inquire(str(script), workers=(3,), steps=STEPS, threads=1, servers=servers)
    assert (report.problem, report.verdict, report.causes) == ("", "equal", ())


def test_every_planted_fault_is_tested() -> None:
    assert sorted(path.stem for path in FAULTS.glob("*.py")) == sorted(EXPECTED)
