"""The seam between the rest of the house and a framework: one worker's copy of a model and its optimizer.

What is known of a framework's models and optimizers is known behind this seam alone. In front of it there are slots (see
``unisono.layout``) and torch CPU or CUDA tensors: the format in which gradients and state are summed, sent and stored. A replica
of another framework shares its memory with them (DLPack, NumPy views), or copies.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.layout import Allocate, Layout
from unisono.replica.buffers import Buffers
from unisono.replica.randomness import seed_generators
from unisono.sync.base import GradientSink

LossFunction = Callable[[Any, Any], Any]
"""``loss(model, batch)``: the microbatch's loss *sum* (scalar) and the *count* to divide by once, globally; or one scalar, which
is the mean over the microbatch's samples."""

MetricFunction = Callable[[Any, Any], Any]
"""``metric(model, batch)``: the metric's sum over the microbatch and the count to divide by, or one scalar: the mean."""


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One of the parts of a global batch that this worker computes."""

    number: int
    """m, counted over the whole global batch."""
    indices: npt.NDArray[np.int64]
    """Sample indices, int64, 1-D."""
    data: Any
    """What ``collate_fn`` made of them."""


@dataclasses.dataclass(frozen=True)
class LossPart:
    """What a microbatch adds to the step besides its gradient."""

    loss: Tensor
    """Summed loss, 0-dim, detached."""
    count: float


class Replica(abc.ABC):
    """A model and its optimizer, as one worker has them. Everything here is *local*.

    Attributes:
        layout: Where the trainable parameters lie.
        device: Where the model computes.
        model: What loss and metric functions are called with.
        optimizer: What trains it, as the user knows it; None: nothing that the user knows.
        loss: What is trained; as a metric, what an evaluation measures by default.
        buffers: What forward changes besides the trainable parameters.
        sparse: Slots (by index) that get gradients of few rows, as ``torch.sparse_coo`` tensors.
        wants_rows: Those of them of which the optimizer, too, is to see rows only.
        updates_apart: Whether the optimizer is known to update each parameter on its own, and to draw no random numbers, so that
            each worker can update a part of them. Else every worker updates all.
        updates_whole: Whether ``update`` always needs the gradients and the state of all.
        has_modes: Whether the optimizer trains other weights than those to use, and needs the state of all to tell one from the
            other.
    """

    layout: Layout
    device: torch.device
    model: Any
    optimizer: Any = None
    loss: MetricFunction
    buffers: Buffers
    sparse: Collection[int] = frozenset()
    wants_rows: Collection[int] = frozenset()
    updates_apart: bool = False
    updates_whole: bool = False
    has_modes: bool = False

    # ------------------------------------------------------------------ the model

    @abc.abstractmethod
    def adopt(self, allocate: Allocate) -> list[Tensor]:
        """Moves the trainable parameters into flat memory, one tensor a block. From now on that memory is where they are: what
        is written there is what the next microbatch is computed with, and ``update`` changes it in place."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All parameters (frozen ones, too) and buffers, each once, by name: their memory."""

    def frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, each once, by name: their memory. Nobody averages or publishes them, but code
        between two steps may change them (a target network, say)."""
        return {}

    @abc.abstractmethod
    def model_state(self) -> dict[str, Any]:
        """What the model's file holds, by name."""

    @abc.abstractmethod
    def load_model_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``model_state`` gave."""

    def seed(self, seed: int) -> None:
        """Seeds all generators that the model may draw from with 64 bits."""
        seed_generators(seed, self.device)

    def check_unchanged(self) -> None:  # noqa: B027 - not every framework lets it be changed
        """Whether the model still trains just the parameters of ``layout``; asked before the first of some steps.

        Raises:
            ConfigurationError: It trains others.
        """

    def edits(self) -> Sequence[int]:
        """Numbers that change when parameters are written to, as far as the framework counts that; the memory is looked at
        besides."""
        return ()

    def kinds(self) -> dict[str, Any]:
        """Names of what the user has given besides the model, and settings of the schedule, for a person and to tell runs apart:
        plain JSON."""
        return {"optimizer": type(self).__name__, "scheduler": None, "schedule": None}

    def final_state(self) -> dict[str, Any]:
        """What the model's file holds of a run that ends here: ``model_state`` with the weights to use, if the optimizer trains
        others."""
        return self.model_state()

    def rest(self) -> None:  # noqa: B027 - most optimizers train the weights to use
        """Training has ended, perhaps for now: the model has the weights to use. ``train`` undoes that, bit by bit."""

    def train(self) -> bool:
        """The model has the weights that are trained; whether it had others. Called before anything is done with others."""
        return False

    @contextlib.contextmanager
    def trained_weights(self) -> Iterator[None]:
        """While the body runs the model has the weights that are trained; afterwards those that it had."""
        had_others = self.train()
        yield
        if had_others:
            self.rest()

    def training(self) -> AbstractContextManager[bool]:
        """While the body runs the model is in training mode; says whether it was not. Afterwards it is as it was."""
        return contextlib.nullcontext(False)

    def fingerprint(self, threads: int) -> dict[str, str | int]:
        """What bits depend on besides torch and the machine, by field: versions, settings, threads of another framework. Warns if
        that does not compute with so many ``threads``."""
        return {}

    @property
    def is_resting(self) -> bool:
        """Whether the model as a whole is in evaluation mode now."""
        return False

    def changed_modes(self) -> dict[str, bool]:
        """The parts of the model that someone has put into another mode since ``training`` began, by name: whether it is training
        mode."""
        return {}

    def change_modes(self, changed: Mapping[str, bool]) -> None:  # noqa: B027
        """What ``changed_modes`` gave, of the same run at another time or place: it is done when ``training`` begins."""

    # ------------------------------------------------------------------ a step

    def begin_step(self) -> None:  # noqa: B027
        """A step begins: whether the parameters still lie where ``adopt`` has put them.

        Raises:
            ConfigurationError: They do not.
        """

    def rows(self, microbatches: Sequence[Microbatch], seeds: Sequence[int]) -> list[list[Tensor]] | None:
        """If the loss sees the whole batch, what it sees of these microbatches, computed as in ``gradients``: for each the same
        number of tensors ``[samples, ...]``. Then ``see`` and ``gradients`` follow. None: ``gradients`` is all there is."""
        return None

    def see(self, rows: Sequence[Tensor], first: int, seed: int) -> None:
        """Computes the loss of the whole batch, and the gradient of its rows.

        Args:
            rows: Of all samples of the global batch, in order; leaves.
            first: The row at which this worker's microbatches begin.
            seed: 64 bits, for what the loss draws.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def gradients(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        """Computes the gradients of some microbatches with the parameters of now, each under a seed of its own, and gives them to
        ``sink`` one microbatch after the other, in order.

        Of each microbatch, all that its forward has left in ``buffers`` is there when ``sink.add`` is called; when that returns,
        they hold what they held before.

        Raises:
            ConfigurationError: Loss function or model cannot be trained exactly.
        """

    def seed_update(self, seed: int) -> None:
        """Seeds what the optimizer may draw from in the next update with 64 bits."""
        if not self.updates_apart:
            self.seed(seed)

    @abc.abstractmethod
    def update(self, slots: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """The optimizer's step with these gradients, those of ``wants_rows`` as coalesced ``torch.sparse_coo`` tensors, unless
        they are dense; all other parameters have none, and stay."""

    def end_step(self) -> None:  # noqa: B027 - most frameworks compute where ``adopt`` has put the parameters
        """A step is done, and code between this one and the next may look at the model."""

    @abc.abstractmethod
    def learning_rates(self) -> tuple[float, ...]:
        """Of each parameter group, if it has one."""

    # ------------------------------------------------------------------ evaluation

    @abc.abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """While the body runs the model is in evaluation mode."""

    @abc.abstractmethod
    def evaluate(self, metrics: Mapping[str, MetricFunction], data: Any, samples: int, seed: int) -> Tensor:
        """The sum and the count of each metric over one microbatch of ``samples`` samples, each under ``seed``: float64
        ``[metrics, 2]``, on the CPU."""

    def outputs(self, returned: Any) -> Any:
        """What a function given to ``predict`` has returned, with torch tensors for those of another framework."""
        return returned

    # ------------------------------------------------------------------ the optimizer's state

    @abc.abstractmethod
    def slot_state(self, slot: int) -> Mapping[str, Any]:
        """The optimizer's state of a parameter, as it is in memory: tensors, numbers, None, by key; nothing if there is none."""

    @abc.abstractmethod
    def place_state(self, slot: int, key: str, value: Any) -> None:
        """Makes ``value`` itself the state's value: if it is a tensor, the state lies in its memory from now on (until an update
        puts another in its place, as some optimizers do)."""

    @abc.abstractmethod
    def set_slot_state(self, slot: int, state: Mapping[str, Any], *, strides: bool = True) -> None:
        """Gives the parameter a copy of a state that ``slot_state`` gave, of this or another replica, where the optimizer would
        have it.

        Args:
            strides: Whether its tensors have the strides that they had; else those of a parameter's shape get the parameter's.
        """

    def whole_state(self) -> Any:
        """All that the optimizer keeps, as plain values and tensors that are its own, if that is more than ``slot_state`` and
        ``hyperparameters`` tell; else None."""
        return None

    def set_whole_state(self, state: Any) -> None:
        """Gives the optimizer what ``whole_state`` gave, of this or another replica; the tensors become its own.

        Raises:
            CheckpointError: It does not take it.
        """
        raise NotImplementedError

    def proving(self) -> AbstractContextManager[None]:
        """Around the first update, if what the optimizer keeps must be saved or handed over: that all of it is told.

        Raises:
            ConfigurationError: The optimizer keeps what ``slot_state`` or ``whole_state`` do not tell.
        """
        return nullcontext()

    @abc.abstractmethod
    def clear_state(self, slots: Collection[int] | None = None) -> None:
        """Forgets the state of these parameters (None: all state)."""

    @abc.abstractmethod
    def hyperparameters(self) -> list[dict[str, Any]]:
        """The optimizer's settings by parameter group, as they are now: later steps do not change what is returned."""

    @abc.abstractmethod
    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]], *, exactly: bool = False) -> None:
        """Gives the parameter groups the settings that ``hyperparameters`` gave.

        Args:
            exactly: Whether what groups have besides goes.

        Raises:
            CheckpointError: There is another number of groups.
        """

    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The same settings where the optimizer has them: what is done to them later shows."""
        return self.hyperparameters()

    # ------------------------------------------------------------------ the schedule

    def advance_schedule(self, loss: float) -> None:  # noqa: B027
        """A step with this loss has been taken: the next learning rates."""

    def check_schedule(self, steps: int) -> None:  # noqa: B027
        """Whether the schedule lasts for so many steps of the whole run.

        Raises:
            ConfigurationError: It does not.
        """

    def schedule_state(self) -> Any:
        """Where the schedule is; None if there is none."""
        return None

    def set_schedule_state(self, state: Any) -> None:  # noqa: B027
        """Takes over what ``schedule_state`` gave."""

    def skip_update(self) -> None:  # noqa: B027
        """The result of an update has been taken over from another worker, as if ``update`` had been called."""
