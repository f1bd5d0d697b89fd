#!/bin/sh
# Guess: the reshuffling of repeat() hashes seed and epoch, so seeds give unrelated orders.
# Seen with grain 0.2.18, Python 3.11, 2026-11-30: the epoch is added to the seed.
# Why it matters: runs with seeds 0, 1, 2, taken for independent repeats, go through the same orders one epoch apart.
# Output: seed 0 epoch 1 is seed 1 epoch 0: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check grain==0.2.18
cat > "$dir/see.py" <<'EOF'
import grain

def epoch(seed, number, n=50):
    data = grain.MapDataset.range(n).shuffle(seed=seed).repeat(3)
    return [int(data[number * n + i]) for i in range(n)]

same = epoch(0, 1) == epoch(1, 0)
print(f"seed 0 epoch 1 is seed 1 epoch 0: {same}")
assert same and epoch(0, 0) != epoch(0, 1)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
