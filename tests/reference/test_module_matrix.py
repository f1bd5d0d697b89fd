"""Every module of PyTorch's own test database that has parameters: equal to the plain loop, bit-equal on 1, 2 and 3 workers.

The database gives constructors and inputs; samples of the same kind are drawn from them. ``KINDS`` says where the batch is.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

from tests.reference.harness import Setup, assert_close, assert_same_bits, in_unison, plainly

BATCH_SIZE, MICROBATCHES, SAMPLES = 8, 4, 20  # two full batches and half a one: microbatches of two samples throughout
INPUTS_A_MODULE = 6
"""At most so many of a module's inputs are run, evenly spread over those that fit: some modules have hundreds alike."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the inputs of a module are made of samples."""

    unbatched: tuple[int, ...] = ()
    """Number of dimensions of each positional input of one sample (tuples of tensors count flat); an input with one more is
    a batch. () where that varies: every input of two or more dimensions is a batch then."""
    batch: tuple[int, ...] = ()
    """Dimension in which samples are stacked, for each input; -1, and (): 0, or 1 where the module is not batch_first."""
    masks: tuple[str, ...] = ()
    """Keyword inputs that belong to a sample (one dimension each); the other ones are alike for all."""


_ENCODER = Kind((2,), masks=("src_key_padding_mask",))
_SEQUENCE = Kind((2, 2, 2), batch=(-1, 1, 1))
KINDS = {
    **{
        f"nn.{name}{n}d": Kind((n + 1,)) for n in (1, 2, 3) for name in ("Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose")
    },
    **{f"nn.InstanceNorm{n}d": Kind((n + 1,)) for n in (1, 2, 3)},
    "nn.BatchNorm1d": Kind(),
    "nn.BatchNorm2d": Kind((3,)),
    "nn.BatchNorm3d": Kind((4,)),
    "nn.Linear": Kind((1,)),
    "nn.Bilinear": Kind((1, 1)),
    "nn.LinearCrossEntropyLoss": Kind(),
    "nn.GroupNorm": Kind(),
    "nn.LayerNorm": Kind(),
    "nn.RMSNorm": Kind(),
    "nn.TransformerEncoder": _ENCODER,
    "nn.TransformerEncoderLayer": _ENCODER,
    "nn.TransformerDecoderLayer": Kind((2, 2), masks=("tgt_key_padding_mask", "memory_key_padding_mask")),
    "nn.Transformer": Kind((2, 2), masks=("src_key_padding_mask", "tgt_key_padding_mask")),
    "nn.MultiheadAttention": Kind((2, 2, 2), masks=("key_padding_mask",)),
    "nn.Embedding": Kind(),
    "nn.PReLU": Kind(),
    "nn.RNNCell": Kind((1, 1)),
    "nn.GRUCell": Kind((1, 1)),
    "nn.LSTMCell": Kind((1, 1, 1)),
    "nn.RNN": _SEQUENCE,
    "nn.GRU": _SEQUENCE,
    "nn.LSTM": _SEQUENCE,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A module with inputs from which samples can be drawn."""

    info: ModuleInfo
    number: int
    given: ModuleInput
    module: nn.Module
    inputs: tuple[Tensor, ...]
    """The positional inputs, flat, each of one sample."""
    pools: tuple[Tensor, ...]
    """The numbers that integer inputs are drawn from: those of the whole input, 0 and 1."""
    nested: bool
    """Whether the inputs from the second on are given as one tuple."""
    dims: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.info.name}-{self.number}{'-' * bool(self.given.desc)}{self.given.desc}"


class Wrapped(nn.Module):
    """The module, called with a batch of samples; all its floating-point outputs, flat."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module = copy.deepcopy(case.module).double()
        self._case = case

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        case = self._case
        placed = [tensor.movedim(0, dim) for tensor, dim in zip(inputs, case.dims, strict=True)]
        arguments = [placed[0], tuple(placed[1:])] if case.nested else placed
        return list(_floats(self.module(*arguments, **self._keywords(len(inputs[0])))))

    def _keywords(self, samples: int) -> dict[str, Any]:
        keywords = {key: value for key, value in self._case.given.forward_input.kwargs.items() if key != "input"}
        for key in KINDS[self._case.info.name].masks:
            if keywords.get(key) is not None:
                keywords[key] = keywords[key].reshape(-1, keywords[key].shape[-1])[0].expand(samples, -1)
        attention = keywords.get("attn_mask")
        if attention is not None and attention.dim() == 3:  # one mask a head: the same for each sample
            keywords["attn_mask"] = attention.repeat(samples, 1, 1)
        return keywords


class Drawn(torch.utils.data.Dataset[list[Tensor]]):
    """Samples of the given kind, each different."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(3)
        self._tensors = [_like(tensor, pool, generator) for tensor, pool in zip(case.inputs, case.pools, strict=True)]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[index] for tensor in self._tensors]


def _like(sample: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    shape = (SAMPLES, *sample.shape)
    if sample.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return pool[torch.randint(0, len(pool), shape, generator=generator)]


def _floats(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for output in outputs or ():
            yield from _floats(output)


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    # A lone number is a sum over samples already; of anything else, some smooth function.
    totals = [output.sin().sum() + (output - 0.3).square().sum() if output.dim() else output for output in model(batch)]
    return torch.stack(totals).sum(), len(batch[0])


def _cases(info: ModuleInfo) -> list[Case]:
    """The module's inputs that fit."""
    found: list[Case] = []
    given = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    for number, one in enumerate(given):
        case = _case(info, number, one)
        if case is not None:
            found.append(case)
    return found


def _case(info: ModuleInfo, number: int, given: ModuleInput) -> Case | None:
    kind = KINDS[info.name]
    constructor = given.constructor_input
    if constructor.kwargs.get("reduction") == "mean":
        return None  # with class weights or ignored targets the mean over a batch is no sum over samples
    torch.manual_seed(number)
    module = info.module_cls(*constructor.args, **constructor.kwargs)
    arguments = list(given.forward_input.args) or [given.forward_input.kwargs["input"]]
    nested = len(arguments) > 1 and isinstance(arguments[1], tuple)
    flat = [arguments[0], *arguments[1]] if nested else arguments
    if not list(module.parameters()) or not flat[0].numel() or not flat[0].dim():
        return None
    layers = [part for part in module.modules() if hasattr(part, "batch_first")]
    first = int(bool(layers) and not layers[0].batch_first)
    dims = tuple(first if dim < 0 else dim for dim in (kind.batch or (first,) * len(flat)))[: len(flat)]
    if not kind.unbatched and flat[0].dim() < 2:
        return None
    batched = not kind.unbatched or flat[0].dim() > kind.unbatched[0]
    samples = tuple(tensor.select(dim, 0) if batched else tensor for tensor, dim in zip(flat, dims, strict=True))
    pools = tuple(torch.cat([tensor.flatten(), torch.arange(2, dtype=tensor.dtype)]).unique() for tensor in flat)
    return Case(info, number, given, module, samples, pools, nested, dims)


def _spread(cases: list[Case]) -> list[Case]:
    if len(cases) <= INPUTS_A_MODULE:
        return cases
    return [cases[number * (len(cases) - 1) // (INPUTS_A_MODULE - 1)] for number in range(INPUTS_A_MODULE)]


with warnings.catch_warnings():
    # PyTorch's notes on its inference fast path, and on modules whose construction is new.
    warnings.simplefilter("ignore", UserWarning)
    FITTING = {info.name: _cases(info) for info in module_db if info.name in KINDS}
CASES = [case for cases in FITTING.values() for case in _spread(cases)]


def setup(case: Case, *, training: bool = True) -> Setup:
    torch.manual_seed(5)
    model = Wrapped(case)
    with torch.no_grad():
        model(torch.utils.data.default_collate([Drawn(case)[index] for index in range(2)]))  # lazy ones take shape
    if hasattr(model.module, "reset_running_stats"):
        model.module.reset_running_stats()
    model.train(training)
    return Setup(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), loss)


def has_batch_statistics(case: Case) -> bool:
    return isinstance(case.module, nn.modules.batchnorm._BatchNorm)


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_module_trains_as_in_the_plain_loop_and_bit_equal_on_one_two_and_three_workers(case: Case) -> None:
    data = Drawn(case)
    runs = [
        in_unison(workers, lambda: setup(case), data, batch_size=BATCH_SIZE, microbatches=MICROBATCHES, epochs=2)
        for workers in (1, 2, 3)
    ]
    for run in runs[1:]:
        assert_same_bits(runs[0], run, case.id)
    if has_batch_statistics(case):
        # Statistics are of a microbatch, so whole batches are the same only where there is one microbatch.
        runs[0] = in_unison(1, lambda: setup(case), data, batch_size=BATCH_SIZE, microbatches=1, epochs=2)
    plain = plainly(lambda: setup(case), data, batch_size=BATCH_SIZE, epochs=2)
    assert_close(runs[0], plain, 1e-10, case.id)
    assert runs[0].norms[0] > 0


def test_every_module_with_parameters_is_in_the_matrix() -> None:
    named = {info.name for info in module_db}
    assert KINDS.keys() <= named, KINDS.keys() - named
    with_parameters = set()
    for info in module_db:
        given = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
        for one in given[:4]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                module = info.module_cls(*one.constructor_input.args, **one.constructor_input.kwargs)
            if list(module.parameters()):
                with_parameters.add(info.name)
    assert with_parameters <= KINDS.keys()


def test_at_least_thirty_modules_are_run() -> None:
    assert len({case.info.name for case in CASES}) >= 30
    assert all(FITTING[name] for name in KINDS), [name for name in KINDS if not FITTING[name]]
