"""Microbatches that are computed in one pass have the bits of separate passes, or are computed separately."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unisono
from tests.reference.harness import Outcome, Samples, Setup, assert_same_bits, in_unison
from unisono.replica import one_pass as module
from unisono.replica.base import Microbatch
from unisono.replica.torch_replica import TorchReplica
from unisono.sync.base import GradientSink
from unisono.tree import Fold, Span

JOINED = "joined"


class Sums(GradientSink):
    """Sums all microbatches along the tree, and takes any group at once.

    Args:
        together: Whether it does.
        count: Microbatches.
    """

    def __init__(self, together: bool, count: int) -> None:
        self.together = together
        self.taken: list[Span] = []
        self._fold: Fold[Any] = Fold(count, lambda left, right: module._add_all(left, right))

    def nodes(self, lo: int, hi: int, kept_bytes: int) -> list[Span]:
        return [(lo, hi)] if self.together else [(m, m + 1) for m in range(lo, hi)]

    def add(self, microbatch: int, gradients: Any) -> None:
        self.taken.append((microbatch, microbatch + 1))
        self._fold.push(microbatch, [None if g is None else g.clone() for g in gradients])

    def add_node(self, node: Span, gradients: Any) -> None:
        self.taken.append(node)
        self.sums = [None if g is None else g.clone() for g in gradients]

    def total(self) -> list[Any]:
        if hasattr(self, "sums"):
            return self.sums
        (total,) = self._fold.parts().values()
        return list(total)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass is chosen wherever it can be, however slow."""
    monkeypatch.setattr(module._GroupKind, "wins", property(lambda self: True))


def summed(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    output = model(inputs)
    return F.cross_entropy(output.flatten(0, -2), targets.flatten(), reduction="sum"), targets.numel()


def replica_of(model: nn.Module, loss: Any = summed) -> TorchReplica:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TorchReplica(model, torch.optim.SGD(trained, lr=0.1), loss, device=torch.device("cpu"))


def parts_of(data: Callable[[int], Any], count: int = 4, rows: int = 8) -> list[Microbatch]:
    inputs, targets = data(count * rows)
    return [
        Microbatch(
            m,
            np.arange(m * rows, (m + 1) * rows),
            (inputs[m * rows : (m + 1) * rows].clone(), targets[m * rows : (m + 1) * rows].clone()),
        )
        for m in range(count)
    ]


def vectors(width: int) -> Callable[[int], Any]:
    def make(samples: int) -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(samples, width, generator=generator), torch.randint(0, 5, (samples,), generator=generator)

    return make


def texts(samples: int) -> Any:
    ids = torch.randint(0, 11, (samples, 13), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def pictures(samples: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 8, 8, generator=generator), torch.randint(0, 5, (samples,), generator=generator)


def computed(replica: TorchReplica, parts: list[Microbatch], together: bool) -> tuple[list[Any], list[Any], list[Span]]:
    """Losses, gradients and what was given at once, after the kind is known."""
    seeds = [100 + part.number for part in parts]
    for _ in range(10 if together else 0):
        replica.gradients(parts, seeds, Sums(together, len(parts)))
    sink = Sums(together, len(parts))
    found = replica.gradients(parts, seeds, sink)
    return [part.loss for part in found], sink.total(), sink.taken


def assert_alike(
    model: Callable[[], nn.Module], data: Callable[[int], Any], loss: Any = summed, rows: int = 8, count: int = 4
) -> str:
    """Both ways give the same bits; "joined", or why the microbatches are computed separately."""
    made: list[Any] = []
    for together in (False, True):
        torch.manual_seed(3)
        replica = replica_of(model(), loss)
        made.append(computed(replica, parts_of(data, count, rows), together))
    (losses, gradients, _), (other_losses, other_gradients, taken) = made
    assert all(map(module._same_bits, losses, other_losses))
    assert all(map(module._same_bits, gradients, other_gradients))
    if taken == [(0, count)]:
        assert not replica._one_pass.reasons
        return JOINED
    assert replica._one_pass.reasons
    return "; ".join(sorted(replica._one_pass.reasons))


def mlp(*widths: int, middle: Callable[[int], nn.Module] = lambda width: nn.ReLU(), bias: bool = True) -> nn.Module:
    layers = [module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b, bias=bias), middle(b))]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 5, bias=bias))


class Language(nn.Module):
    """A causal transformer of today's kind, with weights that are used twice."""

    def __init__(self, *, dropout: float = 0.0, tied: bool = True, recomputes: bool = False, permutes: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.place = nn.Parameter(torch.randn(12, 16) * 0.02)
        self.norm, self.other = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mixed, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.recomputes, self.permutes = recomputes, permutes

    def attend(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        if self.permutes:
            q, k, v = self.mixed(x).reshape(samples, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.view(samples, tokens, 2, width // 2).transpose(1, 2) for part in self.mixed(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(samples, tokens, width))

    def block(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.other(x)))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        for _ in range(2):  # the same weights twice
            x = checkpoint(self.block, x, use_reentrant=False) if self.recomputes else self.block(x)
        return self.head(x)


class Mixing(nn.Module):
    """Looks at all rows of a microbatch."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(16, 16), nn.Linear(16, 5), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


class Called(Mixing):
    """A model in whose forward something else happens."""

    def __init__(self, happens: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(lambda x: happens(self, x))
        self.register_buffer("seen", torch.zeros(16))
        self.calls = 0


JOINS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "linear": (lambda: mlp(16, 64, 64), vectors(16)),
    "no bias": (lambda: mlp(16, 64, bias=False), vectors(16)),
    "norm": (lambda: mlp(16, 64, middle=nn.LayerNorm), vectors(16)),
    "dropout": (lambda: mlp(16, 64, middle=lambda _: nn.Dropout(0.3)), vectors(16)),
    "vector kernels": (lambda: mlp(16, 33, 64, middle=lambda _: nn.SiLU()), vectors(16)),
    "odd widths": (lambda: mlp(10, 100, 257), vectors(10)),
    "group norm": (lambda: nn.Sequential(nn.Linear(16, 12), nn.GroupNorm(3, 12), nn.Linear(12, 5)), vectors(16)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(72, 5)),
        pictures,
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 5)),
        vectors(16),
    ),
    "frozen": (lambda: nn.Sequential(nn.Linear(16, 16).requires_grad_(False), nn.ReLU(), nn.Linear(16, 5)), vectors(16)),
    "language": (Language, texts),
    "language, dropout": (lambda: Language(dropout=0.2), texts),
    "language, untied": (lambda: Language(tied=False), texts),
    "encoder": (
        lambda: nn.Sequential(
            nn.Embedding(11, 16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), nn.Linear(16, 11)
        ),
        texts,
    ),
    "queries, keys and values in one": (lambda: Language(permutes=True), texts),
    "rows mixed by known means": (lambda: Mixing(lambda x: x - x.mean(0)), vectors(16)),
    "rows sorted": (lambda: Mixing(lambda x: x.sort(dim=0).values), vectors(16)),
    "in-batch similarities": (lambda: Mixing(lambda x: (x @ x.T).softmax(-1) @ x), vectors(16)),
    "rows with a maximum": (lambda: Mixing(lambda x: x / x.abs().max()), vectors(16)),
}
SEPARATE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], str]] = {
    "batch norm": (lambda: mlp(16, 16, middle=nn.BatchNorm1d), vectors(16), "changes buffers"),
    "recomputed": (lambda: Language(recomputes=True), texts, ""),
    "recurrent": (lambda: nn.Sequential(nn.Embedding(11, 16), nn.GRU(16, 11, batch_first=True), First()), texts, ""),
    "writes a buffer": (lambda: Called(lambda self, x: x + self.seen.copy_(x.detach().mean(0))), vectors(16), "changes buffers"),
    "counts its calls": (lambda: Called(_count), vectors(16), "sets attributes"),
    "keeps a tensor": (lambda: Called(_keep), vectors(16), "sets attributes"),
    "numpy's randomness": (lambda: Called(lambda self, x: x * float(np.random.uniform(1, 2))), vectors(16), "random numbers"),
    "noise of all rows": (lambda: Mixing(lambda x: x + torch.randn(x.shape)), vectors(16), ""),
    "as many rows as it says": (lambda: Mixing(lambda x: x / len(x)), vectors(16), "other bits"),
    "numbers the rows": (lambda: Mixing(lambda x: x + torch.arange(len(x))[:, None]), vectors(16), ""),
    "looks at values": (lambda: Mixing(lambda x: x * x.sum().item()), vectors(16), "looks at values"),
    "depends on values": (lambda: Mixing(lambda x: x * 2 if x[0, 0] > 0 else x), vectors(16), ""),
}


def _count(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return x


def _keep(model: Any, x: Tensor) -> Tensor:
    model.kept = x
    return x


class First(nn.Module):
    def forward(self, pair: Any) -> Any:
        return pair[0]


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("name", JOINS)
def test_models_are_computed_in_one_pass_with_the_bits_of_separate_ones(name: str) -> None:
    assert assert_alike(*JOINS[name]) == JOINED


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("name", SEPARATE)
def test_what_cannot_be_computed_in_one_pass_is_computed_separately(name: str) -> None:
    model, data, reason = SEPARATE[name]
    found = assert_alike(model, data)
    assert found != JOINED
    assert reason in found


def _with_penalty(model: Any, batch: Any) -> tuple[Tensor, int]:
    total, count = summed(model, batch)
    return total + sum(parameter.square().sum() for parameter in model.parameters()), count


def _calls_a_part(model: Any, batch: Any) -> tuple[Tensor, int]:
    total, count = summed(model, batch)
    return total + model[0](batch[0]).square().sum(), count


def _two_views(model: Any, batch: Any) -> tuple[Tensor, int]:
    total, count = summed(model, batch)
    return total + model(batch[0] + 1).square().sum(), count


def _noisy(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    output = model(inputs + torch.randn_like(inputs) * float(np.random.uniform(0, 1)))
    return F.cross_entropy(output + torch.randn_like(output), targets, reduction="sum"), len(targets)


def _mixed(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    weight = 0.5 + torch.rand(())
    return weight * F.cross_entropy(model(inputs)[inputs[:, 0] > 0], targets[inputs[:, 0] > 0], reduction="sum"), int(
        (inputs[:, 0] > 0).sum()
    )


def _alone(model: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


class Labelled(nn.Module):
    """Computes its own loss, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(16, 32)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _own_loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return model(inputs, labels=targets)["loss"] * len(targets), len(targets)


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("loss", [_noisy, _mixed, _alone])
def test_a_loss_function_runs_as_it_does_alone(loss: Any) -> None:
    assert assert_alike(lambda: mlp(16, 32), vectors(16), loss) == JOINED


@pytest.mark.usefixtures("_chosen")
def test_a_model_may_compute_its_loss_itself() -> None:
    assert assert_alike(Labelled, vectors(16), _own_loss) == JOINED


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (_with_penalty, "outside of the model's forward"),
        (_calls_a_part, "outside of the model's forward"),
        (_two_views, "calls the model more than once"),
    ],
)
def test_a_loss_function_that_uses_parameters_elsewhere_is_computed_separately(loss: Any, reason: str) -> None:
    assert reason in assert_alike(lambda: mlp(16, 32), vectors(16), loss)


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8])
def test_groups_of_any_size_are_summed_along_the_tree(count: int) -> None:
    assert assert_alike(lambda: mlp(16, 64, 64, middle=nn.LayerNorm), vectors(16), count=count) == JOINED


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 12, 250])
def test_microbatches_of_any_size_have_the_bits_of_separate_passes(rows: int) -> None:
    for middle in (lambda _: nn.ReLU(), lambda _: nn.Sigmoid()):
        assert_alike(lambda middle=middle: mlp(16, 33, middle=middle), vectors(16), rows=rows)


def test_microbatches_of_other_shapes_are_computed_separately() -> None:
    torch.manual_seed(3)
    replica = replica_of(nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11)))
    parts = [
        Microbatch(m, np.arange(2), (torch.zeros(2, 5 + m % 2, dtype=torch.int64), torch.zeros(2, 5 + m % 2, dtype=torch.int64)))
        for m in range(4)
    ]

    assert computed(replica, parts, together=True)[2] == [(m, m + 1) for m in range(4)]


class Turning(nn.Module):
    """Rows are apart until it is told otherwise, and nobody can see it from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.told = nn.Linear(16, 16), nn.Linear(16, 5), [False]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x / len(x) if self.told[0] else x)


@pytest.mark.usefixtures("_chosen")
def test_the_guard_ends_one_pass_when_bits_differ_and_what_is_published_is_right() -> None:
    torch.manual_seed(3)
    model = Turning()
    replica, parts, seeds = replica_of(model), parts_of(vectors(16)), [1, 2, 3, 4]
    for _ in range(17):  # the first is measured; 16 uses
        replica.gradients(parts, seeds, Sums(True, 4))
    model.told[0] = True

    given_at_once = 0
    for _ in range(16):  # up to the 32nd use
        sink = Sums(True, 4)
        replica.gradients(parts, seeds, sink)
        given_at_once += sink.taken == [(0, 4)]
    assert given_at_once == 15
    replica.gradients(parts, seeds, Sums(True, 4))  # without sums inside backward
    right = Sums(False, 4)
    replica.gradients(parts, seeds, right)
    assert all(map(module._same_bits, sink.total(), right.total()))
    assert replica._one_pass.reasons == {"the loss has other bits"}


def test_an_error_of_the_model_is_the_users_error() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fails = nn.Linear(16, 5), [False]

        def forward(self, x: Tensor) -> Tensor:
            if self.fails[0]:
                raise ValueError("a bug")
            return self.layer(x)

    model = Failing()
    replica, parts = replica_of(model), parts_of(vectors(16))
    for _ in range(4):
        replica.gradients(parts, [1, 2, 3, 4], Sums(True, 4))
    model.fails[0] = True

    with pytest.raises(ValueError, match="a bug"):
        replica.gradients(parts, [1, 2, 3, 4], Sums(True, 4))
    assert "forward" not in vars(model)


def setup_of(model: Callable[[], nn.Module]) -> Callable[[], Setup]:
    def setup() -> Setup:
        torch.manual_seed(2)
        made = model()
        return Setup(made, torch.optim.AdamW(made.parameters(), lr=0.01), summed)

    return setup


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("name", ["norm", "language, dropout"])
def test_one_pass_changes_no_bit_of_training_on_any_number_of_workers(name: str) -> None:
    model, data = (JOINS.get(name) or SEPARATE[name])[:2]
    samples = Samples(*data(104))

    def trained(workers: int, one_pass: Any, microbatches: int) -> Outcome:
        sync = unisono.Exact(replicate_kib=0, one_pass=one_pass)
        return in_unison(workers, setup_of(model), samples, batch_size=48, microbatches=microbatches, epochs=5, sync=sync)

    for microbatches, numbers in ((8, (1, 2, 3, 5, 7)), (6, (1, 4))):
        first = trained(1, False, microbatches)
        for workers in numbers:
            assert_same_bits(first, trained(workers, "auto", microbatches), f"{workers} workers, {microbatches} microbatches")


def test_the_limit_of_memory_makes_groups_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Span] = []
    taken = unisono.sync.exact.ExactReduction.add_node

    def add_node(self: Any, node: Span, gradients: Any) -> None:
        seen.append(node)
        taken(self, node, gradients)

    monkeypatch.setattr(unisono.sync.exact.ExactReduction, "add_node", add_node)
    monkeypatch.setattr(module._GroupKind, "wins", property(lambda self: True))
    samples = Samples(*vectors(16)(64))
    for mib, largest in ((None, 8), (0.01, 2), (1e-6, 1)):
        seen.clear()
        sync = unisono.Exact(replicate_kib=0, one_pass_mib=mib)
        in_unison(1, setup_of(lambda: mlp(16, 64, 64)), samples, batch_size=64, microbatches=8, epochs=12, sync=sync)
        assert max(hi - lo for lo, hi in seen) == largest


_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "norm": nn.LayerNorm,
    "relu": lambda width: nn.ReLU(),
    "gelu": lambda width: nn.GELU(),
    "silu": lambda width: nn.SiLU(),
    "dropout": lambda width: nn.Dropout(0.2),
    "softmax": lambda width: nn.Softmax(-1),
    "scale": lambda width: Scaled(width),
    "bilinear": lambda width: Twice(width),
}


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + x.mean(-1, keepdim=True)


class Twice(nn.Module):
    """One weight, used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight.T


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=5),
    width=st.sampled_from([3, 8, 16, 33, 64]),
    rows=st.integers(1, 9),
    count=st.integers(2, 8),
)
def test_random_models_have_the_bits_of_separate_passes(names: list[str], width: int, rows: int, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._GroupKind, "wins", property(lambda self: True))
        assert_alike(
            lambda: nn.Sequential(*(_LAYERS[name](width) for name in names), nn.Linear(width, 5)),
            vectors(width),
            rows=rows,
            count=count,
        )
