#!/bin/sh
# Guess: fold_in and split derive unrelated keys.
# Seen with jax 0.10.2 (jax_threefry_partitionable is on by default), Python 3.11, 2026-11-30: they are equal for every n, and split(key, 3) begins split(key, 7).
# Why it matters: fold_in(key, rank) on every worker, beside key, sub = split(key), gives ranks 0 and 1 exactly the keys that are used for
# something else: the same noise in two places.
# Output: equal: True True True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2
cat > "$dir/see.py" <<'EOF'
import jax

key = jax.random.key(0)
keys = jax.random.key_data(jax.random.split(key, 3))
equal = [bool((jax.random.key_data(jax.random.fold_in(key, i)) == keys[i]).all()) for i in range(3)]
print("equal:", *equal)
assert all(equal)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
