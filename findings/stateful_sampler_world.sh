#!/bin/sh
# Guess: a state from another number of ranks raises, or the position is converted.
# Seen with torchdata 0.11.0, torch 2.13.0, Python 3.11, 2026-11-30: the state is only the number that this rank has yielded. Of 16 samples 2 ranks
# saw 4 each; 4 ranks that load this each skip their 4, which is everything: half of the epoch is lost without a word.
# Why it matters: a resume on more workers drops samples, on fewer it repeats them.
# Output: state {'yielded': 4}; samples seen in the epoch: 8 of 16
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
cat > "$dir/see.py" <<'EOF'
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

data, seen = list(range(16)), []
for rank in range(2):
    sampler = StatefulDistributedSampler(data, num_replicas=2, rank=rank, seed=0)
    numbers = iter(sampler)
    seen += [next(numbers) for _ in range(4)]
    state = sampler.state_dict()
for rank in range(4):
    sampler = StatefulDistributedSampler(data, num_replicas=4, rank=rank, seed=0)
    sampler.load_state_dict(state)
    seen += list(sampler)
print(f"state {state}; samples seen in the epoch: {len(set(seen))} of 16")
assert len(set(seen)) == 8
EOF
cd "$dir"
venv/bin/python see.py || exit 1
