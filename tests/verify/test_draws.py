from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.verify.draws import constant_draws

DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(torch.ones(3)),
    "randint": lambda: torch.randint(2, 9, (3,)),
    "randperm": lambda: torch.randperm(3),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.5)),
    "uniform_": lambda: torch.empty(3).uniform_(-1, 1),
    "normal_": lambda: torch.empty(3).normal_(2, 1),
    "multinomial": lambda: torch.multinomial(torch.ones(5), 2),
    "dropout": lambda: F.dropout(torch.ones(3), 0.5),
    "attention": lambda: F.scaled_dot_product_attention(*torch.ones(3, 1, 2, 4, 8), dropout_p=0.3),
    "gru": lambda: nn.GRU(2, 3, num_layers=2, dropout=0.5)(torch.ones(4, 1, 2))[0] * 0,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_whatever_was_drawn_before(name: str) -> None:
    with constant_draws():
        first = DRAWS[name]()
        torch.default_generator.manual_seed(99)
        second = DRAWS[name]()
    assert torch.equal(first, second)
    assert torch.isfinite(first.double()).all()


def test_draws_are_constant_for_each_element_so_that_a_batch_can_be_cut() -> None:
    with constant_draws():
        assert torch.equal(torch.rand(6, 2)[:3], torch.rand(3, 2))
        assert torch.equal(F.dropout(torch.ones(6, 2), 0.5), torch.full((6, 2), 2.0))


def test_gradients_flow() -> None:
    weight = torch.ones(4, requires_grad=True)
    with constant_draws():
        F.dropout(weight * 3, 0.25).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.full((4,), 4.0))


def test_outside_nothing_changes() -> None:
    with constant_draws():
        pass
    assert torch.rand(100).unique().numel() > 90
