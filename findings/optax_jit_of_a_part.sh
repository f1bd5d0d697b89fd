#!/bin/sh
# Guess: Adam works on each parameter alone, so updating a part of the tree gives that part the same bits.
# Seen with optax 0.2.8, jax 0.10.2 on CPU, Python 3.11, 2026-11-30: 478 of 4096 weights differ after 10 steps with adam (462 with adamw, 0 with sgd and
# lion); with one parameter XLA fuses the bias correction otherwise. Counts depend on the processor.
# Why it matters: an optimizer sharded over workers, each jitting what it owns, makes the weights depend on who owns what.
# Output: weights that differ: adam 478, sgd 0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 optax==0.2.8 numpy==2.4.6
cat > "$dir/see.py" <<'EOF'
import jax, jax.numpy as jnp, numpy as np, optax

rng = np.random.default_rng(0)
start, slope = ({k: jnp.asarray(rng.standard_normal((64, 64)), jnp.float32) for k in "ab"} for _ in range(2))

def train(names, optimizer):
    weights = {k: start[k] for k in names}
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, gradients):
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    for i in range(10):
        weights, state = step(weights, state, {k: slope[k] * (i + 1) for k in names})
    return weights["a"]

adam, sgd = (int((train("ab", o) != train("a", o)).sum()) for o in (optax.adam(1e-2), optax.sgd(1e-2, 0.9)))
print(f"weights that differ: adam {adam}, sgd {sgd}")
assert adam and not sgd
EOF
cd "$dir"
venv/bin/python see.py || exit 1
