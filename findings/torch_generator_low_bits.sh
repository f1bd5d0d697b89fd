#!/bin/sh
# Guess: manual_seed takes 64 bits, so a 64-bit hash of (seed, step, rank) gives streams that practically never coincide.
# Seen with torch 2.13.0 on CPU, Python 3.11, 2026-11-30: seeds that agree modulo 2**32 draw the same numbers; initial_seed() tells them apart.
# Why it matters: of 65,536 keyed generators two share a stream with a chance of 39 %, and keys that differ in high bits only all do.
# Output: initial seeds 1 4294967297; same numbers: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import torch

one, other = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
same = torch.equal(torch.rand(100, generator=one), torch.rand(100, generator=other))
print("initial seeds", one.initial_seed(), other.initial_seed(), end="; ")
print(f"same numbers: {same}")
assert same and one.initial_seed() != other.initial_seed()
EOF
cd "$dir"
venv/bin/python see.py || exit 1
