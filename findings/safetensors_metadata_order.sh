#!/bin/sh
# Guess: the format is canonical, so equal content gives an equal digest.
# Seen with safetensors 0.8.0, Python 3.11, 2026-11-30: tensors are sorted, but the metadata's keys come in the order of a randomised hash map: 20 saves
# of 8 keys in one process give many different files. With one key the bytes are stable.
# Why it matters: sha256sum over the files of equal replicas, or of a resumed run, differs. Keep one JSON text under one key.
# Output: files among 20 saves: one key 1, eight keys more than 10
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import hashlib
import numpy as np
from safetensors.numpy import save

def files(keys):
    notes = {str(i): "v" for i in range(keys)}
    return len({hashlib.sha256(save({"w": np.ones(2)}, metadata=notes)).digest() for _ in range(20)})

one, eight = files(1), files(8)
print(f"files among 20 saves: one key {one}, eight keys {eight}")
assert one == 1 and eight > 10
EOF
cd "$dir"
venv/bin/python see.py || exit 1
