#!/bin/sh
# Guess: random.seed (or torch.manual_seed) before the pipeline makes wds.shuffle repeatable.
# Seen with webdataset 1.0.2, Python 3.11, 2026-11-30: two runs after the same random.seed differ; only rng= makes them equal.
# Why it matters: a pipeline under a seeded trainer trains on another order in every run and after every resume.
# Output: equal: random.seed False, rng= True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2
cat > "$dir/see.py" <<'EOF'
import random
import webdataset as wds

def order(**settings):
    random.seed(0)
    return list(wds.DataPipeline(lambda: iter(range(200)), wds.shuffle(200, **settings)))

seeded = order() == order()
own = order(rng=random.Random(0)) == order(rng=random.Random(0))
print(f"equal: random.seed {seeded}, rng= {own}")
assert not seeded and own
EOF
cd "$dir"
venv/bin/python see.py || exit 1
