#!/bin/sh
# Guess: saving step 5 beside step 10 writes it, and saving step 10 again raises or overwrites.
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2, Python 3.11, 2026-11-30: both return False and write nothing; without the return value nobody learns of it.
# Why it matters: a run taken back to an older step, as after bad data, saves nothing until it has passed the newest old step; a crash
# before then resumes from the run that was given up.
# Output: saved 10, 5, 10: True False False; steps [10], value 1.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import os
import jax.numpy as jnp
import orbax.checkpoint as ocp

manager = ocp.CheckpointManager(os.path.abspath("checkpoints"))

def save(step, value):
    done = manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(4, value)}))
    manager.wait_until_finished()
    return done

seen = [save(10, 1.0), save(5, 2.0), save(10, 3.0)]
value = float(manager.restore(10, args=ocp.args.StandardRestore({"w": jnp.zeros(4)}))["w"][0])
print("saved 10, 5, 10:", *seen, "; steps", list(manager.all_steps()), "value", value)
assert seen == [True, False, False] and list(manager.all_steps()) == [10] and value == 1.0
EOF
cd "$dir"
venv/bin/python see.py || exit 1
