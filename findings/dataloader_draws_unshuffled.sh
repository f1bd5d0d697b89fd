#!/bin/sh
# Guess: shuffle=False and num_workers=0 need no random numbers, so none are drawn.
# Seen with torch 2.13.0, Python 3.11, 2026-11-30: every iter() draws one seed for workers from the global generator, also with batch_size=None.
# Why it matters: evaluating on rank 0 only, or at other steps after a resume, changes the dropout masks of all steps that follow.
# A generator of the loader's own keeps the global one still.
# Output: moved: plain True, batch_size=None True, own generator False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import torch
from torch.utils.data import DataLoader

def moved(**settings):
    before = torch.get_rng_state()
    list(DataLoader(range(4), shuffle=False, num_workers=0, **settings))
    return not torch.equal(before, torch.get_rng_state())

seen = moved(), moved(batch_size=None), moved(generator=torch.Generator())
print("moved: plain %s, batch_size=None %s, own generator %s" % seen)
assert seen == (True, True, False)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
