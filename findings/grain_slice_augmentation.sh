#!/bin/sh
# Guess: a seeded data set gives each sample its own random numbers, whichever worker reads it.
# Seen with grain 0.2.18, Python 3.11, 2026-11-30: numbers belong to positions at random_map. Sliced [rank::W] after it samples keep theirs;
# sliced before it, where one shards to save work, they change with W, and position i draws from the same key on every rank.
# Why it matters: the augmentation of a sample depends on the number of workers by the order of two lines.
# Output: sliced after: equal True; sliced before: equal False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check grain==0.2.18
cat > "$dir/see.py" <<'EOF'
import grain

def noisy(x, rng):
    return int(x), int(rng.integers(1 << 40))

source = grain.MapDataset.range(8).seed(5)
whole = source.random_map(noisy)
wanted = [whole[i] for i in (1, 3, 5, 7)]
after, before = source.random_map(noisy)[1::2], source[1::2].random_map(noisy)
seen = [[part[i] for i in range(4)] == wanted for part in (after, before)]
print("sliced after: equal %s; sliced before: equal %s" % tuple(seen))
assert seen == [True, False]
EOF
cd "$dir"
venv/bin/python see.py || exit 1
