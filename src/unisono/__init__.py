"""Data-parallel training in which every replica holds the same model, bit for bit, on any number of workers.

Start with :class:`Trainer`; the command is ``unisono run SCRIPT``.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unisono.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    Desync,
    FingerprintMismatch,
    UnisonoError,
    WorkerFailure,
)
from unisono.version import __version__

if TYPE_CHECKING:
    from unisono.data.batch import Batch
    from unisono.data.loader import Loader
    from unisono.data.streams import Streams
    from unisono.integrations.prometheus import Prometheus
    from unisono.integrations.tensorboard import TensorBoard
    from unisono.observe.summary import Summary
    from unisono.replica.whole_batch import WholeBatchLoss
    from unisono.sync.exact import Exact
    from unisono.training.callbacks import Callback
    from unisono.training.step import StepResult
    from unisono.training.trainer import Trainer
    from unisono.world import World

# Imported on first use: the command must not wait for torch before it can say anything.
_HOMES = {
    "Batch": "unisono.data.batch",
    "Callback": "unisono.training.callbacks",
    "Exact": "unisono.sync.exact",
    "Loader": "unisono.data.loader",
    "Prometheus": "unisono.integrations.prometheus",
    "StepResult": "unisono.training.step",
    "Streams": "unisono.data.streams",
    "Summary": "unisono.observe.summary",
    "TensorBoard": "unisono.integrations.tensorboard",
    "Trainer": "unisono.training.trainer",
    "WholeBatchLoss": "unisono.replica.whole_batch",
    "World": "unisono.world",
}

__all__ = [
    "Batch",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "Desync",
    "Exact",
    "FingerprintMismatch",
    "Loader",
    "Prometheus",
    "StepResult",
    "Streams",
    "Summary",
    "TensorBoard",
    "Trainer",
    "UnisonoError",
    "WholeBatchLoss",
    "WorkerFailure",
    "World",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    # A collection in the middle of imports takes as long as they do: it looks at all of PyTorch's objects, and frees none.
    collects = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(_HOMES[name]), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value
