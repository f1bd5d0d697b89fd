"""What ``test_keras_replica`` looks at, computed in a process of its own, since a framework cannot be unloaded.

KERAS_BACKEND=... python keras_worlds.py cases FILE FOLDER    several worlds of threads; what they find goes to FILE, as JSON
unisono run ... keras_worlds.py train FOLDER                  one run, of which worker 1 kills itself once
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from keras import layers, ops

import unisono
import unisono.integrations.keras
from unisono.testing import run_threads

LENGTH, KINDS, CLASSES, SAMPLES = 6, 50, 5, 54
_random = np.random.default_rng(0)
TOKENS = _random.integers(0, KINDS, (SAMPLES, LENGTH)).astype("int32")
DATA = [(tokens, np.int32(tokens[0] % CLASSES)) for tokens in TOKENS]  # 18 a batch, so all microbatches have 3


def make_model() -> keras.Model:
    """All that a step can leave behind: rows of an embedding, moving statistics, random masks, frozen weights."""
    keras.utils.set_random_seed(0)
    frozen = layers.Dense(16, trainable=False)
    x = tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(KINDS, 8)(x))
    x = layers.BatchNormalization()(layers.Dense(16, activation="gelu")(frozen(x)))
    return keras.Model(tokens, layers.Dense(CLASSES)(layers.Dropout(0.2)(x)))


def loss(model: Any, batch: Any) -> tuple[Any, int]:
    x, y = batch
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)), y.shape[0]


def accuracy(model: Any, batch: Any) -> tuple[Any, int]:
    x, y = batch
    return ops.sum(ops.equal(ops.argmax(model(x), axis=-1), ops.cast(y, "int32"))), y.shape[0]


def make_trainer(collective: Any = None, **settings: Any) -> unisono.Trainer:
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 12)
    optimizer = settings.pop("optimizer", None) or keras.optimizers.AdamW(schedule)
    given = {"batch_size": 18, "microbatches": 6, "max_grad_norm": 0.5, "collective": collective, **settings}
    return unisono.Trainer(make_model(), optimizer, loss, **given)


def digest(arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def weights(model: Any) -> str:
    """Digest of the variables as the user sees them, without those of random generators."""
    return digest(ops.convert_to_numpy(variable) for variable in model.weights)


def fitted(collective: Any = None, epochs: int = 2, *, measures: bool = False, **settings: Any) -> dict[str, Any]:
    trainer = make_trainer(collective, **settings)
    summary = trainer.fit(DATA, epochs)
    found = {
        "weights": weights(trainer.model),
        "optimizer": digest(ops.convert_to_numpy(variable) for variable in trainer.optimizer.variables),
        "steps": int(trainer.optimizer.iterations),
        "loss": summary.loss,
    }
    if not measures:  # compiling for it costs much
        return found
    return {
        **found,
        "evaluated": trainer.evaluate(DATA, {"loss": loss, "accuracy": accuracy, "again": lambda *given: loss(*given)}),
        "predicted": digest([trainer.predict(list(TOKENS)).numpy()]),
    }


def begun(collective: Any, *, run_dir: Path) -> None:
    make_trainer(collective, run_dir=run_dir).fit(DATA, 1)


class Edits(unisono.Callback):
    """Assigns to weights, to a statistic and to the learning rate between two steps."""

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == 2:
            last = trainer.model.layers[-1]
            last.bias.assign(last.bias + 1.0)
            trainer.model.layers[5].moving_mean.assign(trainer.model.layers[5].moving_mean * 0.5)
            trainer.optimizer.learning_rate = 0.003


def edited(collective: Any = None) -> list[Any]:
    edits = Edits()
    trainer = make_trainer(collective, optimizer=keras.optimizers.Adam(0.01), callbacks=[edits])
    rates = [trainer.step(batch).learning_rates for batch in trainer.batches(DATA, 1)]
    return [weights(trainer.model), rates, float(ops.mean(trainer.model.layers[-1].bias))]


def compiled(collective: Any = None, *, microbatches: int) -> Any:
    """A compiled model given alone, without what is random or depends on the size of a microbatch."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(KINDS, 8),
            layers.Flatten(),
            layers.Dense(CLASSES, kernel_regularizer="l2"),
        ]
    )
    cross = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), cross, metrics=["accuracy"])
    if not microbatches:
        targets = np.array([target for _, target in DATA])
        model.fit(TOKENS, targets, batch_size=18, epochs=3, shuffle=False, verbose=0)
        return [ops.convert_to_numpy(variable).tolist() for variable in model.weights]
    trainer = unisono.Trainer(model, batch_size=18, microbatches=microbatches, collective=collective)
    trainer.fit(DATA, 3, order="sequential")
    assert isinstance(trainer.optimizer, keras.optimizers.SGD)
    return [ops.convert_to_numpy(variable).tolist() for variable in model.weights]


def refusal(make: Callable[[], Any]) -> str:
    try:
        make()
    except unisono.ConfigurationError as error:
        return str(error)
    return "nothing was refused"


class Unseeded(layers.Layer):
    def call(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x))


def unseeded() -> None:
    inputs = keras.Input((LENGTH,))
    try:
        model = keras.Model(inputs, Unseeded()(layers.Dense(2)(inputs)))
    except ValueError as error:  # JAX: Keras refuses by itself
        raise unisono.ConfigurationError(str(error)) from None
    data = [(np.ones(LENGTH, "float32"), np.int32(0))] * 8
    unisono.Trainer(model, keras.optimizers.SGD(), loss, batch_size=8).fit(data, 1)


def fit_with(loss: Any) -> None:
    unisono.Trainer(make_model(), keras.optimizers.SGD(), loss, batch_size=18, microbatches=6).fit(DATA, 1)


def with_threads_of_two() -> str:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = make_trainer()._local.replica.fingerprint(2)
    return json.dumps([[str(warning.message) for warning in seen if "computes with" in str(warning.message)], found])


REFUSALS: dict[str, Callable[[], Any]] = {
    "unbuilt": lambda: unisono.Trainer(keras.Sequential([layers.Dense(1)]), keras.optimizers.SGD(), loss, batch_size=8),
    "frozen": lambda: unisono.Trainer(_frozen(), keras.optimizers.SGD(), loss, batch_size=8),
    "no optimizer": lambda: unisono.Trainer(make_model(), None, loss, batch_size=8),
    "torch optimizer": lambda: unisono.Trainer(
        make_model(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), loss, batch_size=8
    ),
    "scaled": lambda: make_trainer(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())),
    "averaged": lambda: make_trainer(optimizer=keras.optimizers.SGD(use_ema=True)),
    "scheduler": lambda: make_trainer(
        scheduler=types.SimpleNamespace(step=lambda: None, state_dict=dict, load_state_dict=lambda state: None)
    ),
    "precision": lambda: make_trainer(precision="bf16"),
    "sharded": lambda: run_threads(2, lambda link: make_trainer(link, sync=unisono.Exact(replicate_kib=0, shard_update=True))),
    "vector": lambda: fit_with(lambda model, batch: model(batch[0])),
    "number": lambda: fit_with(lambda model, batch: 1.0),
    "unseeded": unseeded,
}


def _frozen() -> keras.Model:
    model = make_model()
    model.trainable = False
    return model


def cases(file: Path, folder: Path) -> None:
    found: dict[str, Any] = {"alone": fitted(measures=True), "edited alone": edited(), "model.fit": compiled(microbatches=0)}
    found["untrained"] = weights(make_model())
    found["3 workers"] = run_threads(3, functools.partial(fitted, measures=True))
    found["5 workers"] = run_threads(5, fitted)
    found["edited by 2"] = run_threads(2, edited)
    found["compiled"] = compiled(microbatches=6)
    run_threads(1, functools.partial(begun, run_dir=folder / "run"))
    found["resumed"] = run_threads(2, functools.partial(fitted, run_dir=folder / "run"))
    found["summary"] = json.loads((folder / "run" / "summary.json").read_text())
    found["refused"] = {name: refusal(make) for name, make in REFUSALS.items()}
    found["threads"] = with_threads_of_two()
    loaded = make_model()
    unisono.integrations.keras.load_weights(loaded, folder / "run" / "model.safetensors")
    found["loaded"] = weights(loaded)
    found["seconds"] = time.process_time()
    file.write_text(json.dumps(found))


class KillsItselfOnce(unisono.Callback):
    edits_weights = False

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if trainer.world.rank == 1 and result.step == 3 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path) -> None:
    make_trainer(run_dir=folder / "run", callbacks=[KillsItselfOnce(folder / "killed")]).fit(DATA, 2)


if __name__ == "__main__":
    if sys.argv[1] == "cases":
        cases(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        train(Path(sys.argv[2]))
