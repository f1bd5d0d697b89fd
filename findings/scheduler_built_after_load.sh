#!/bin/sh
# Guess: once optimizer and scheduler have both loaded their states, the learning rates go on as before.
# Seen with torch 2.13.0, Python 3.11, 2026-11-30: constructing a scheduler writes the optimizer's rate, and its load_state_dict does not write it back.
# Built before the loads all is well. Built between them, CosineAnnealingLR and StepLR survive, LambdaLR is wrong for one step, and LinearLR and
# SequentialLR, which multiply the current rate, stay wrong by the warm-up's factor to the end.
# Why it matters: a resumed run, exact in every weight and moment, trains on with another rate.
# Output: rates of three steps wanted [0.69134, 0.5, 0.30866], built between [0.1, 0.07232, 0.04465], built before [0.69134, 0.5, 0.30866]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import copy, torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

def schedule(sgd):
    return SequentialLR(sgd, [LinearLR(sgd, 0.1, 1, 2), CosineAnnealingLR(sgd, 8)], [2])

def rates(sgd, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(round(sgd.param_groups[0]["lr"], 5))
        sgd.step()
        scheduler.step()
    return seen

sgd = optimizer()
scheduler = schedule(sgd)
rates(sgd, scheduler, 5)
saved = copy.deepcopy((sgd.state_dict(), scheduler.state_dict()))
wanted = rates(sgd, scheduler, 3)
resumed = []
for load_first in (True, False):
    sgd = optimizer()
    if load_first:
        sgd.load_state_dict(copy.deepcopy(saved[0]))
    scheduler = schedule(sgd)
    if not load_first:
        sgd.load_state_dict(copy.deepcopy(saved[0]))
    scheduler.load_state_dict(copy.deepcopy(saved[1]))
    resumed.append(rates(sgd, scheduler, 3))
print("wanted", wanted, "built between", resumed[0], "built before", resumed[1])
assert resumed == [[0.1, 0.07232, 0.04465], wanted]
EOF
cd "$dir"
venv/bin/python see.py || exit 1
