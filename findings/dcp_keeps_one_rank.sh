#!/bin/sh
# Guess: each rank, having a file of its own, gets back what it saved; or all get rank 0's values.
# Seen with torch 2.13.0, Gloo, 2 ranks, Python 3.11, 2026-11-30: equal keys are taken for replicas and shared out over the ranks to balance their bytes:
# some come from rank 1, others from rank 0, on both ranks, without a warning.
# Why it matters: each rank's random state or sampler position, saved under one key, is replaced by one rank's, so all draw the same masks
# after a resume; and replicas that have drifted apart are saved as a mixture. Put the rank into the key.
# Output: every rank loads from ranks [0, 1], the same on all
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import logging, os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

logging.disable(logging.WARNING)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch.distributed.checkpoint as dcp

def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    names = ("a", "b", "c", "d")
    dcp.save({name: torch.full((1000,), float(rank)) for name in names}, checkpoint_id=f"{folder}/saved")
    state = {name: torch.full((1000,), -1.0) for name in names}
    dcp.load(state, checkpoint_id=f"{folder}/saved")
    origin = [int(state[name][0]) for name in names]
    everyone = [None, None]
    dist.all_gather_object(everyone, origin)
    if rank == 0:
        print("every rank loads from ranks", sorted(set(origin)), ", the same on all:", everyone[0] == everyone[1])
    dist.destroy_process_group()
    assert everyone[0] == everyone[1] and set(origin) == {0, 1}

if __name__ == "__main__":
    mp.spawn(work, (os.getcwd(),), nprocs=2)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
