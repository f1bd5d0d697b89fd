#!/bin/sh
# Guess: reading an optimizer's state changes nothing; one that has not stepped has none.
# Seen with torch 2.13.0 on CPU, Python 3.11, 2026-11-30: to create the state the call steps once with zero gradients and a learning rate of zero,
# and leaves step = 1 behind. Weights trained three steps from there differ with Adam, AdamW, NAdam, RAdam, Adamax, Adafactor, Rprop, ASGD and
# SGD with dampening; not with SGD, RMSprop, Adagrad, Adadelta.
# Why it matters: a run that saves at step 0 trains other weights than one that does not (Adam's bias correction is a step ahead), and
# nothing in the checkpoint tells them apart.
# Output: states before 0, after 2, step 1.0; same weights: AdamW False, SGD True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

def trained(kind, read, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    if read:
        get_optimizer_state_dict(model, optimizer)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.bias.detach()

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
before = len(optimizer.state)
get_optimizer_state_dict(model, optimizer)
after, step = len(optimizer.state), float(optimizer.state[model.bias]["step"])
same = [torch.equal(trained(kind, False), trained(kind, True)) for kind in (torch.optim.AdamW, torch.optim.SGD)]
print(f"states before {before}, after {after}, step {step}; same weights: AdamW {same[0]}, SGD {same[1]}")
assert (before, after, step) == (0, 2, 1.0) and same == [False, True]
EOF
cd "$dir"
venv/bin/python see.py || exit 1
