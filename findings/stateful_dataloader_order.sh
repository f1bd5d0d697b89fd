#!/bin/sh
# Guess: a drop-in DataLoader gives DataLoader's order from the same seed, whatever num_workers is.
# Seen with torchdata 0.11.0, torch 2.13.0, Python 3.11, 2026-11-30: the order with no worker processes differs from that with two, both
# from DataLoader's; DataLoader itself does not care.
# Why it matters: a smaller machine that loads in the main process trains on other batches, though seed and data are the same.
# Output: DataLoader equal: True; StatefulDataLoader equal: False; one like the other: False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
cat > "$dir/see.py" <<'EOF'
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

if __name__ == "__main__":
    def order(kind, workers):
        torch.manual_seed(0)
        return [int(x) for x in kind(list(range(10)), shuffle=True, num_workers=workers)]

    plain, stateful = ([order(kind, n) for n in (0, 2)] for kind in (DataLoader, StatefulDataLoader))
    like = plain[0] in stateful
    print(f"DataLoader equal: {plain[0] == plain[1]}; StatefulDataLoader equal: {stateful[0] == stateful[1]}; one like the other: {like}")
    assert plain[0] == plain[1] and stateful[0] != stateful[1] and not like
EOF
cd "$dir"
venv/bin/python see.py || exit 1
