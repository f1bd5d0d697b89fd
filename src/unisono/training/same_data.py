"""Whether a run goes on over the data in which it stopped: digests of the epoch's order and of a few samples. *Local.*"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from unisono.data.epochs import EpochFollowers, kept_attributes
from unisono.data.loader import Loader
from unisono.errors import ConfigurationError
from unisono.replica.randomness import kept_generators
from unisono.training.call_data import CallData


class EpochData:
    """What an epoch of a call of ``fit`` or ``batches`` goes over.

    Args:
        data: Of the call.
        loader: How samples are loaded.
    """

    def __init__(self, data: CallData, loader: Loader) -> None:
        self._data, self._loader = data, loader

    def identify(self, epoch: int, batch: int) -> dict[str, Any]:
        """What tells these data from others, before batch ``batch`` of epoch ``epoch``. It may be asked of one worker alone:
        nothing shows afterwards that random numbers were drawn and samples read."""
        before = epoch if batch else epoch - 1  # of an epoch that has not begun the order is not known yet
        followed, collate = self._data.followed, self._loader.collate_fn
        with kept_generators(), kept_attributes(followed, collate):
            order = self._data.digest(before) if before >= 0 else ""
            EpochFollowers(followed, collate).set_epoch(epoch)
            samples = self._data.probed(epoch)
        return {"order": order, "samples": samples}

    def differs(self, there: Mapping[str, Any], epoch: int, batch: int) -> str:
        """How these data differ from those that ``identify`` saw at the same place; "" if they do not."""
        here = self.identify(epoch, batch)
        if here["order"] != there["order"]:
            return (
                f"the order gives other batches for epoch {epoch + (batch > 0)} than it did then. A sampler must give the same "
                "order for the same epoch whenever it is asked: derive it from set_epoch(epoch), not from what it has given "
                "before or from the model"
            )
        if any(one != other and one and other for one, other in zip(here["samples"], there["samples"], strict=False)):
            return (
                f"samples of the data set are not what they were in epoch {epoch + 1} then. What changes in the data set while a "
                "run goes on must follow from set_epoch(epoch), which is called in every process, or be set in a callback's "
                "on_begin(trainer) from trainer.position"
            )
        return ""


def check_resumed(data: EpochData, there: Mapping[str, Any] | None, epoch: int, batch: int, *, tells: bool) -> None:
    """Whether a run that stopped before batch ``batch`` of epoch ``epoch`` goes on over the data of then.

    Args:
        there: What they were; None: nobody knows.
        tells: Whether this worker speaks for all.

    Raises:
        ConfigurationError: It does not, in the middle of an epoch. Between two epochs that is a warning: what the next one would
            have been cannot be known.
    """
    if there is None or not (found := data.differs(there, epoch, batch)):
        return
    if batch:
        raise ConfigurationError(f"the run stopped in the middle of epoch {epoch + 1}, and cannot go on exactly: {found}")
    if tells:
        warnings.warn(f"the run may go on differently than without the stop: {found}", stacklevel=2)
