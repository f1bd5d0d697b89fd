#!/bin/sh
# Guess: the bytes of torch.save depend on what is saved alone.
# Seen with torch 2.13.0, Python 3.11, 2026-11-30: the folder inside the archive is named after the file; the same name elsewhere gives the same bytes.
# Why it matters: sha256sum over step_10.pt and final.pt, or rank0.pt and rank1.pt, calls equal replicas different.
# Output: other name equal: False; same name in another folder equal: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import hashlib, os, torch

def digest(name):
    os.makedirs(os.path.dirname(name), exist_ok=True)
    torch.save({"w": torch.ones(3)}, name)
    return hashlib.sha256(open(name, "rb").read()).hexdigest()

other, same = digest("x/a.pt") == digest("x/b.pt"), digest("x/a.pt") == digest("y/a.pt")
print(f"other name equal: {other}; same name in another folder equal: {same}")
assert not other and same
EOF
cd "$dir"
venv/bin/python see.py || exit 1
