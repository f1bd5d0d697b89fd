#!/bin/sh
# Guess: from one seed, a shorter draw is the beginning of a longer one, or it never is.
# Seen with torch 2.13.0 on CPU, Python 3.11, 2026-11-30: rand has that property; randn below 16 numbers uses another method,
# from 16 on it works in blocks of 16 and, where the length is no multiple of 16, draws the last 16 numbers anew.
# Why it matters: a worker that draws only its rows of a noise tensor, or a shard of a weight, gets other values for some lengths only.
# Output: equal of n in randn, rand: 8 of 16: 0 8; 20 of 32: 4 20; 16 of 32: 16 16
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import torch

def equal(draw, short, long):
    a, b = (draw(n, generator=torch.Generator().manual_seed(3)) for n in (short, long))
    return int((a == b[:short]).sum())

seen = {(n, m): (equal(torch.randn, n, m), equal(torch.rand, n, m)) for n, m in ((8, 16), (20, 32), (16, 32))}
print(seen)
assert seen == {(8, 16): (0, 8), (20, 32): (4, 20), (16, 32): (16, 16)}
EOF
cd "$dir"
venv/bin/python see.py || exit 1
