"""Two hosts of two workers each, for real: network namespaces, torchrun on each, and the bytes on the wire between them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.virtual_hosts import WIRE, NoNamespaces, VirtualHosts, address, virtual_hosts
from tests.forked import start_script
from unisono.system.fork_server import ForkServer

STEPS = 4
LAYERS, WIDTH = 16, 256
WEIGHTS_BYTES = 4 * LAYERS * WIDTH * WIDTH

SCRIPT = f"""
import hashlib, itertools, json, statistics, sys
from pathlib import Path
import torch, unisono
from torch import nn

def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).sum(), batch[0].numel()

torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})])
data = torch.utils.data.TensorDataset(torch.randn(16, {WIDTH}), torch.randn(16, {WIDTH}))
trainer = unisono.Trainer(
    model, torch.optim.Adam(model.parameters()), loss, batch_size=16, microbatches=8, sync=unisono.Exact(share_weights=True)
)

def sent():
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("{WIRE}:"):
            return int(line.partition(":")[2].split()[8])
    return 0

counts = []
for number, batch in enumerate(trainer.batches(data, epochs={STEPS} + 1)):
    trainer.collective.barrier()
    counts.append(sent())
    trainer.collective.barrier()
    if "die" in sys.argv and trainer.collective.rank == 3 and number == 2:
        raise OSError("the data set is gone")
    trainer.step(batch)
trainer.collective.barrier()
counts.append(sent())
trainer.collective.barrier()
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
steps = [after - before for before, after in itertools.pairwise(counts[1:])]  # in one TCP may have sent something twice
found = dict(transport=type(trainer.collective).__name__, weights=weights, sent=statistics.median(steps))
Path(sys.argv[1], str(trainer.collective.rank)).write_text(json.dumps(found))
"""


@pytest.fixture
def hosts() -> Iterator[VirtualHosts]:
    try:
        with virtual_hosts() as made:
            yield made
    except NoNamespaces as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


def command(host: int, workers: int, script: Path, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host}", f"--nproc-per-node={workers}"]
    return [*launcher, f"--master-addr={address(0)}", "--master-port=29400", str(script), *arguments]


def launch(hosts: VirtualHosts, workers: tuple[int, int], script: Path, *arguments: str) -> list[tuple[int, str]]:
    """Runs the script under torchrun on both hosts: each one's exit status, and what it printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": WIRE, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            hosts.command(host, command(host, count, script, *arguments)),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for host, count in enumerate(workers)
    ]
    try:
        printed = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()  # torchrun's workers end with it
                process.wait()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def found_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_weights_and_gradients_cross_the_wire_once_and_the_bits_are_those_of_one_process(
    hosts: VirtualHosts, tmp_path: Path, warm_commands: ForkServer | None
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folders = [tmp_path / "several", tmp_path / "alone"]
    for folder in folders:
        folder.mkdir()

    ended = launch(hosts, (2, 2), script, str(folders[0]))
    assert [status for status, _ in ended] == [0, 0], ended
    plain = start_script(warm_commands, script, str(folders[1]), folder=tmp_path)
    said, _ = plain.communicate(timeout=60)
    assert plain.returncode == 0, said

    several, (alone,) = map(found_in, folders)
    assert [entry["transport"] for entry in several] == ["Hierarchical"] * 4
    assert [entry["weights"] for entry in several] == [alone["weights"]] * 4
    for entry in several:
        # Half of the gradient and half of the weights leave each host: a ring all-reduce between two hosts.
        assert WEIGHTS_BYTES < entry["sent"] < 1.03 * WEIGHTS_BYTES


def test_an_error_on_one_host_ends_the_workers_of_both(hosts: VirtualHosts, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    ended = launch(hosts, (2, 2), script, str(tmp_path), "die")

    assert all(status for status, _ in ended)
    assert "OSError: the data set is gone" in ended[1][1]
    assert "LostWorker" in ended[0][1]


WAITS = """
import sys, time
from torch.distributed import TCPStore
from unisono.collective import LostWorker, torch_distributed

rank = int(sys.argv[1])
torch_distributed._SILENCE_S = 2.0
store = TCPStore(sys.argv[2], 29400, is_master=rank == 0, wait_for_workers=False)
collective = torch_distributed.TorchDistributed.meet(rank, 2, store, limit_s=300.0)
assert collective.size == 2
print("met", flush=True)
sys.stdin.readline()
if rank == 1:
    time.sleep(300)
try:
    collective.barrier()
except LostWorker as failure:
    print("silent" if failure.silent else "lost", flush=True)
"""


def test_a_host_that_is_out_of_reach_is_noticed_long_before_the_time_limit_of_a_wait(hosts: VirtualHosts, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITS)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    hosts.command(host, [sys.executable, str(script), str(host), address(0)]),
                    env={**os.environ, "GLOO_SOCKET_IFNAME": WIRE},
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for host in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        assert [process.stdout.readline() for process in processes if process.stdout] == ["met\n"] * 2
        hosts.set_link(1, "down")
        began_s = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert processes[0].stdout is not None
        assert processes[0].stdout.readline() == "lost\n"
        assert time.monotonic() - began_s < 60.0
