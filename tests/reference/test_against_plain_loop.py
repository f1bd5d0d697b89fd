"""Training in unison is training: weights and losses are those of a plain PyTorch loop over whole batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.reference.harness import Samples, Setup, assert_close, assert_same_bits, in_unison, plainly, relative_error

EPOCHS = 5
SAMPLES = 155  # at 16 a step: 9 full batches and one of 11, so 50 steps in all
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


class Cnn(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.norm = norm(6)
        self.second = nn.Conv2d(6, 5, 3, stride=2)
        self.out = nn.Linear(5 * 6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.gelu(self.norm(self.first(images)))
        return self.out(torch.tanh(self.second(hidden)).flatten(1))


class Gru(nn.Module):
    """Names the next token of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.gru = nn.GRU(9, 13, batch_first=True)
        self.out = nn.Linear(13, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.gru(self.embedding(tokens))[0])


class Transformer(nn.Module):
    """As above, with attention; the output layer is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(12, 11)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.out.weight.dtype)
        return self.out(self.encoder(self.embedding(tokens), mask=mask))


def vectors(dtype: torch.dtype) -> Samples:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 10, generator=generator, dtype=torch.float64)
    return Samples(inputs.to(dtype), torch.randint(0, 4, (SAMPLES,), generator=generator))


def images(dtype: torch.dtype) -> Samples:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(SAMPLES, 1, 8, 10, generator=generator, dtype=torch.float64)
    return Samples(inputs.to(dtype), torch.randint(0, 4, (SAMPLES,), generator=generator))


def ragged_tokens(dtype: torch.dtype) -> Samples:
    """Sequences of 2 to 7 tokens; what comes after the end is -100 and counts nowhere."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (SAMPLES, 7), generator=generator)
    lengths = torch.randint(2, 8, (SAMPLES, 1), generator=generator)
    return Samples(tokens, torch.where(torch.arange(7) < lengths, tokens.roll(-1, dims=1), -100))


def summed(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def mean(model: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def summed_over_tokens(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    tokens, labels = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 23), nn.Tanh(), nn.Linear(23, 17), nn.GELU(), nn.Linear(17, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[Any, Any], Any]
    data: Callable[[torch.dtype], Samples]
    max_grad_norm: float | None = None
    cosine: bool = False

    def setup(self, dtype: torch.dtype) -> Setup:
        torch.manual_seed(7)
        model = self.model().to(dtype)
        optimizer = self.optimizer(model)
        return Setup(model, optimizer, self.loss, CosineAnnealingLR(optimizer, 50) if self.cosine else None)


CASES = [
    Case("mlp, AdamW, clipping, cosine", mlp, adamw, summed, vectors, max_grad_norm=0.3, cosine=True),
    Case("mlp, mean loss, momentum", mlp, sgd, mean, vectors),
    Case("cnn, momentum, weight decay", lambda: Cnn(lambda _: nn.Identity()), sgd, summed, images, cosine=True),
    Case("cnn, GroupNorm, clipping", lambda: Cnn(lambda n: nn.GroupNorm(2, n)), sgd, mean, images, max_grad_norm=0.5),
    Case("GRU, AdamW, ragged tokens", Gru, adamw, summed_over_tokens, ragged_tokens, max_grad_norm=0.15),
    Case("transformer, momentum, ragged tokens", Transformer, sgd, summed_over_tokens, ragged_tokens, 1.0, cosine=True),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fifty_steps_on_one_and_three_workers_are_those_of_the_plain_loop(case: Case, dtype: torch.dtype) -> None:
    data = case.data(dtype)

    def setup() -> Setup:
        return case.setup(dtype)

    plain = plainly(setup, data, batch_size=16, epochs=EPOCHS, max_grad_norm=case.max_grad_norm)
    one, three = (
        in_unison(workers, setup, data, batch_size=16, microbatches=4, epochs=EPOCHS, max_grad_norm=case.max_grad_norm)
        for workers in (1, 3)
    )
    assert len(plain.losses) == 50
    if case.max_grad_norm is not None:
        assert max(plain.norms) > case.max_grad_norm, "clipping was never needed"
    assert_close(one, plain, TOLERANCES[dtype])
    assert_same_bits(one, three)


BATCH_NORM = Case("cnn, BatchNorm", lambda: Cnn(nn.BatchNorm2d), sgd, summed, images)


def test_batch_norm_with_one_microbatch_is_that_of_the_plain_loop() -> None:
    data = images(torch.float64)
    plain = plainly(lambda: BATCH_NORM.setup(torch.float64), data, batch_size=16, epochs=EPOCHS)
    unison = in_unison(1, lambda: BATCH_NORM.setup(torch.float64), data, batch_size=16, microbatches=1, epochs=EPOCHS)
    assert_close(unison, plain, 1e-10)
    assert int(unison.state["norm.num_batches_tracked"]) == 50


def test_batch_norm_sees_a_microbatch_on_any_number_of_workers() -> None:
    """With more than one microbatch it differs from whole batches by design: M belongs to the run, W does not."""
    data = images(torch.float64)
    plain = plainly(lambda: BATCH_NORM.setup(torch.float64), data, batch_size=16)
    one, three = (
        in_unison(workers, lambda: BATCH_NORM.setup(torch.float64), data, batch_size=16, microbatches=4) for workers in (1, 3)
    )
    assert_same_bits(one, three)
    assert relative_error(one.state["first.weight"], plain.state["first.weight"]) > 1e-4


def test_an_error_of_one_sample_in_a_thousand_would_be_seen() -> None:
    """The bound is worth something: the same loop with a slightly wrong count is far outside."""
    data = vectors(torch.float64)

    def setup(extra: float) -> Setup:
        made = CASES[1].setup(torch.float64)

        def loss(model: Any, batch: Any) -> tuple[Tensor, float]:
            total, count = summed(model, batch)
            return total, count + extra

        return made._replace(loss=loss)

    plain = plainly(lambda: setup(0), data, batch_size=16)
    wrong = in_unison(2, lambda: setup(0.001), data, batch_size=16, microbatches=4)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wrong, plain, 1e-10)
