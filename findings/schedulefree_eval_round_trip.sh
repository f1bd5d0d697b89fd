#!/bin/sh
# Guess: optimizer.eval(), then optimizer.train(), restores the training weights.
# Seen with schedulefree 1.4.1, torch 2.13.0 on CPU, Python 3.11, 2026-11-30: both interpolate in place, so a few of 1000 weights come back rounded
# otherwise (4 with AdamWScheduleFree, 2 with SGDScheduleFree; the count depends on the processor).
# Why it matters: evaluating or saving at other steps, as after a resume, changes the trained weights.
# Output: weights changed by eval() and train(): 4, 2
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
cat > "$dir/see.py" <<'EOF'
import torch, schedulefree

def changed(kind):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000))
    optimizer = kind([weight], lr=1e-2)
    optimizer.train()
    for _ in range(5):
        weight.grad = torch.randn(1000)
        optimizer.step()
    before = weight.detach().clone()
    optimizer.eval()
    optimizer.train()
    return int((before != weight).sum())

seen = changed(schedulefree.AdamWScheduleFree), changed(schedulefree.SGDScheduleFree)
print("weights changed by eval() and train(): %d, %d" % seen)
assert all(seen)
EOF
cd "$dir"
venv/bin/python see.py || exit 1
