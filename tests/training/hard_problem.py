"""A small model and data set with everything in them that could make workers differ."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from unisono import Exact, Loader, Trainer
from unisono.collective import Collective

SAMPLES = 61
BATCH_SIZE = 24  # 24, 24 and 13: the last batch is short
WORDS = 20
Digests = dict[str, str]
"""What a run left, by name: digests of weights, buffers and optimizer state, and the losses as text."""


class Reviews(Dataset[tuple[Tensor, Tensor]]):
    """A picture and a text of its own length; both are augmented, from torch, numpy and random."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pictures = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
        lengths = torch.randint(3, 10, (SAMPLES,), generator=generator).tolist()
        self.texts = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index] + 0.1 * torch.randn(1, 8, 8)
        picture = picture * float(np.random.uniform(0.9, 1.1))
        if random.random() < 0.5:
            picture = picture.flip(-1)
        return picture, self.texts[index]


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Texts padded with word 0 to the longest of the microbatch."""
    texts = nn.utils.rnn.pad_sequence([text for _, text in samples], batch_first=True)
    return {"pictures": torch.stack([picture for picture, _ in samples]), "texts": texts}


class Net(nn.Module):
    """Reads a picture, then predicts each next word of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.narrow = nn.Linear(6 * 36, 10)
        self.odd = nn.Linear(10, 100)
        self.see = nn.Linear(100, 24)
        self.embed = nn.Embedding(WORDS, 24, padding_idx=0)
        self.gru = nn.GRU(24, 24, batch_first=True)
        self.attend = nn.MultiheadAttention(24, 2, dropout=0.1, batch_first=True)
        self.widen = nn.Linear(24, 513)
        self.large = nn.Linear(513, 257)
        self.back = nn.Linear(257, 24)
        self.drop = nn.Dropout(0.2)
        self.speak = nn.Linear(24, WORDS, bias=False)
        self.speak.weight = self.embed.weight
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.seldom = nn.Linear(24, 24)

    def forward(self, pictures: Tensor, texts: Tensor) -> Tensor:
        seen = F.relu(self.norm(self.conv(pictures))).flatten(1)
        seen = self.see(F.relu(self.odd(self.drop(self.narrow(seen)))))
        words = self.embed(texts) + seen[:, None]
        words, _ = self.gru(words)
        causal = nn.Transformer.generate_square_subsequent_mask(texts.shape[1])
        attended, _ = self.attend(words, words, words, attn_mask=causal, need_weights=False)
        words = self.frozen(words + attended)
        if int(texts.sum()) % 3 == 0:  # some microbatches use it, others do not
            words = words + self.seldom(words)
        words = words + self.back(F.gelu(self.large(self.drop(self.widen(words)))))
        spoken: Tensor = self.speak(words)
        return spoken


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed over the words to predict, of which each microbatch has another number."""
    inputs, targets = batch["texts"][:, :-1], batch["texts"][:, 1:]
    output = model(batch["pictures"], inputs)
    return F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum"), (targets != 0).sum()


def make_trainer(collective: Collective | None, microbatches: int, seed: int = 0, **settings: Any) -> Trainer:
    torch.manual_seed(7)
    model = Net()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    return Trainer(
        model,
        optimizer,
        loss,
        batch_size=BATCH_SIZE,
        microbatches=microbatches,
        seed=seed,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        max_grad_norm=0.5,
        collective=collective,
        **settings,
    )


def train(
    collective: Collective | None,
    microbatches: int,
    workers: int,
    *,
    num_workers: int = 0,
    seed: int = 0,
    precision: str = "fp32",
    overlap: bool = False,
    replicated: bool = False,
    share_weights: bool | None = None,
    epochs: int = 2,
) -> Digests:
    """Three steps an epoch; the same on every worker, but for the optimizer state, of which each has its own part."""
    trainer = make_trainer(
        collective,
        microbatches,
        seed,
        precision=precision,
        sync=Exact(overlap=overlap, bucket_mib=0.05, replicate_kib=4096 if replicated else 0, share_weights=share_weights),
    )
    assert trainer.collective.size == workers
    loader = Loader(num_workers=num_workers, collate_fn=collate)
    results = [trainer.step(batch) for batch in trainer.batches(Reviews(), epochs=epochs, loader=loader)]
    assert [result.samples for result in results] == [24, 24, 13] * epochs
    found = {name: digest(value) for name, value in trainer.model.state_dict().items()}
    found |= {f"result {result.step}": repr(result) for result in results}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for parameter, state in trainer.optimizer.state.items():
        found |= {f"optimizer {names[parameter]} {key}": digest(value) for key, value in state.items()}
    return found


def digest(value: Tensor) -> str:
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{value.dtype}{list(value.shape)} {hashlib.sha256(data.tobytes()).hexdigest()[:16]}"


def shared(found: Digests) -> Digests:
    """What every worker must have alike."""
    return {name: value for name, value in found.items() if not name.startswith("optimizer ")}


def merged(everybodys: list[Digests]) -> Digests:
    """The whole run: what all have alike, once, and the optimizer state of whoever updates a parameter: one worker, or all."""
    whole: Digests = {}
    for found in everybodys:
        assert shared(found) == shared(everybodys[0])
        whole |= found
    holders = [sum(name in found for found in everybodys) for name in whole if name.startswith("optimizer ")]
    assert set(holders) in ({1}, {len(everybodys)})
    assert all(whole[name] == value for found in everybodys for name, value in found.items())
    return whole
