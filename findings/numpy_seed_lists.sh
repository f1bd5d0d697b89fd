#!/bin/sh
# Guess: default_rng([seed, step, rank]) is a stream of its own for every list.
# Seen with numpy 2.4.6, Python 3.11, 2026-11-30: lists of up to four numbers are padded with zeros, and numbers are split into 32-bit words:
# 1, [1], [1, 0] and [1, 0, 0, 0] are one stream, [1, 0, 0, 0, 0] another; [1, 1] is 1 + 2**32.
# Why it matters: step 0 on rank 0 of a keyed augmentation repeats the stream that shuffled the data. Put a constant last in the list.
# Output: same: True; five long: False; [1, 1] is 1 + 2**32: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import numpy as np

def draw(seed):
    return np.random.default_rng(seed).integers(1 << 62)

same = len({draw(seed) for seed in (1, [1], [1, 0], [1, 0, 0, 0])}) == 1
five = draw([1, 0, 0, 0, 0]) == draw(1)
words = draw([1, 1]) == draw(1 + 2**32)
print(f"same: {same}; five long: {five}; [1, 1] is 1 + 2**32: {words}")
assert same and not five and words
EOF
cd "$dir"
venv/bin/python see.py || exit 1
