#!/bin/sh
# Guess: a NaN on any rank makes the maximum NaN, as torch.max does, or is ignored as by fmax.
# Seen with torch 2.13.0, Gloo, 2 ranks, Python 3.11, 2026-11-30: in a tensor of one number a NaN of rank 0 stays and one of rank 1 is lost;
# of 64 numbers that are all NaN on rank 0 half come out as NaN. All ranks agree on the result.
# Why it matters: the common check "reduce the loss by MAX and look for NaN" misses bad workers, and which ones depends on their number.
# Output: NaN of rank 0 kept: True; of rank 1: False; of 64 on rank 0: 32
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

def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = []
    for bad in range(2):
        loss = torch.tensor([float("nan") if rank == bad else float(rank)])
        dist.all_reduce(loss, op=dist.ReduceOp.MAX)
        seen.append(bool(loss.isnan()))
    many = torch.full((64,), float("nan") if rank == 0 else 1.0)
    dist.all_reduce(many, op=dist.ReduceOp.MAX)
    seen.append(int(many.isnan().sum()))
    if rank == 0:
        print("NaN of rank 0 kept: %s; of rank 1: %s; of 64 on rank 0: %d" % tuple(seen))
    dist.destroy_process_group()
    assert seen == [True, False, 32]

if __name__ == "__main__":
    mp.spawn(work, (os.getcwd(),), nprocs=2)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
