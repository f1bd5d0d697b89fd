"""A language model that writes text letter by letter: a small GPT on Python's own documentation, or on your text file.

Dropout, tied weights and a cosine schedule; measured in bits per character on the last tenth of the text, which was not trained
on, beside an n-gram model and `xz -9`.

    unisono demo language --workers 2
    unisono demo language --preset nanogpt --run-dir runs/nanogpt       # nanoGPT's setting for CPUs
    unisono demo language --data book.txt --run-dir runs/book --precision bf16
    unisono demo language --predict "The statement"                     # goes on from there
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import unisono
from unisono.demos import _application as application
from unisono.demos._text import compressed, n_gram, read_text
from unisono.report.attachments import TextSample, attach

MICROBATCHES = 4
HELD_OUT = 0.1
NOT_COUNTED = -100
MEASURE = "bits per character"


@dataclass(frozen=True, kw_only=True)
class Preset:
    layers: int
    heads: int
    width: int
    block: int
    """Characters that the model sees at once."""
    dropout: float
    batch_size: int
    epochs: int
    learning_rate: float


PRESETS = {
    "default": Preset(layers=4, heads=4, width=128, block=128, dropout=0.1, batch_size=16, epochs=12, learning_rate=2e-3),
    # nanoGPT's README, "I only have a macbook": 2,000 steps of 12 x 64 characters, which is 4.6 epochs of the default text.
    "nanogpt": Preset(layers=4, heads=4, width=128, block=64, dropout=0.0, batch_size=12, epochs=5, learning_rate=1e-3),
}


class Layer(nn.Module):
    """Attention to what came before, then a feed-forward net, each on top of its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        parts = self.mix(self.norm1(x)).view(samples, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        return x + F.dropout(self.feed(self.norm2(x)), self.dropout, self.training)


class GPT(nn.Module):
    """Characters ``int64 [N, T]``, T up to ``block``, to logits of each next one ``[N, T, C]``."""

    def __init__(self, characters: int, preset: Preset) -> None:
        super().__init__()
        self.block, self.dropout = preset.block, preset.dropout
        self.characters, self.places = nn.Embedding(characters, preset.width), nn.Embedding(preset.block, preset.width)
        self.layers = nn.Sequential(*(Layer(preset.width, preset.heads, preset.dropout) for _ in range(preset.layers)))
        self.norm = nn.LayerNorm(preset.width, bias=False)
        self.head = nn.Linear(preset.width, characters, bias=False)
        self.head.weight = self.characters.weight  # tied
        for name, weight in self.named_parameters():
            if weight.dim() > 1:  # what adds to a layer's input starts smaller, the deeper the net
                into_sum = name.endswith(("out.weight", "feed.2.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * preset.layers) if into_sum else 1))

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places(torch.arange(text.shape[1], device=text.device))
        logits: Tensor = self.head(self.norm(self.layers(F.dropout(x, self.dropout, self.training))))
        return logits


class Pieces(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of the training text, each moved at random, so that every epoch cuts the text elsewhere."""

    def __init__(self, text: Tensor, block: int) -> None:
        self.text, self.block = text, block

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        last = len(self.text) - 1 - self.block
        start = min(index * self.block + int(torch.randint(self.block, ())), last)
        return self.text[start : start + self.block], self.text[start + 1 : start + 1 + self.block]


class HeldOut(Dataset[tuple[Tensor, Tensor]]):
    """The text from ``begin`` on: each character counts once and is seen with at least half a block before it."""

    def __init__(self, text: Tensor, begin: int, block: int) -> None:
        self.text, self.begin, self.block, self.half = text, begin, block, block // 2

    def __len__(self) -> int:
        return -(-(len(self.text) - self.begin) // self.half)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = self.begin + index * self.half
        end = min(first + self.half, len(self.text))
        target = self.text[end - self.block : end].clone()
        target[: self.block - (end - first)] = NOT_COUNTED
        return self.text[end - self.block - 1 : end - 1], target


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    text, target = batch
    total = F.cross_entropy(model(text).flatten(0, 1).float(), target.flatten(), ignore_index=NOT_COUNTED, reduction="sum")
    return total, (target != NOT_COUNTED).sum()


def bits_per_character(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    total, count = loss(model, batch)
    return total / math.log(2), count


@torch.no_grad()
def write(model: GPT, vocabulary: str, prompt: str, length: int, seed: int, temperature: float = 0.8) -> str:
    """Goes on from the prompt, character by character."""
    unknown = [character for character in prompt if character not in vocabulary]
    if unknown:
        raise unisono.ConfigurationError(f"the model has never seen {unknown[0]!r}: leave it out of the prompt")
    model.eval()
    text = [vocabulary.index(character) for character in prompt or vocabulary[0]]
    random = torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = model(torch.tensor([text[-model.block :]]))[0, -1]
        text.append(int(torch.multinomial(F.softmax(logits / temperature, dim=0), 1, generator=random)))
    return "".join(vocabulary[character] for character in text[len(prompt) :])


def predict(run_dir: str, prompt: str, seed: int) -> None:
    """Prints the prompt and how the model goes on."""
    settings = application.trained(run_dir, "language")
    model = GPT(len(settings["vocabulary"]), Preset(**settings["preset"]))
    application.load_weights(model, run_dir)
    print(prompt + write(model, settings["vocabulary"], prompt, 500, seed))


def cosine(step: int, *, steps: int, warm: int) -> float:
    """Share of the learning rate: up over ``warm`` steps, then down along a cosine to a tenth."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm) / (steps - warm)))


def main() -> None:
    parser = application.options(
        "language",
        "Train a small GPT on characters.",
        data="a UTF-8 text file; default: Python's own documentation",
        predict="go on from the text X",
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="sizes and schedule; default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    arguments = parser.parse_args()
    world = unisono.World.from_environment().at_most(MICROBATCHES)
    if arguments.predict is not None:
        return predict(arguments.run_dir, arguments.predict, arguments.seed) if world.is_main else None

    preset = PRESETS[arguments.preset]
    epochs = arguments.epochs or preset.epochs
    arguments.batch_size = arguments.batch_size or preset.batch_size
    text = read_text(arguments.data)
    vocabulary = "".join(sorted(set(text)))
    number = {character: code for code, character in enumerate(vocabulary)}
    codes = torch.tensor([number[character] for character in text])
    begin = len(text) - int(len(text) * HELD_OUT)
    train = Pieces(codes[:begin], preset.block)

    torch.manual_seed(arguments.seed)
    model = GPT(len(vocabulary), preset)
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in model.parameters() if weight.dim() > 1]},
        {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.99), weight_decay=0.1)
    steps = epochs * -(-len(train) // arguments.batch_size)
    held_out = HeldOut(codes, begin, preset.block)
    shown = application.Evaluation(held_out, {MEASURE: bits_per_character}, batch_size=16, every=2, epochs=epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(cosine, steps=steps, warm=min(100, steps // 10)))
    settings = application.settings(arguments, MICROBATCHES) | {"precision": arguments.precision}
    trainer = unisono.Trainer(model, optimizer, loss, scheduler=schedule, max_grad_norm=1.0, callbacks=[shown], **settings)
    trainer.fit(train, epochs=epochs)
    result = shown.measure(trainer)
    if not trainer.world.is_main:
        return
    kept = {"demo": "language", "vocabulary": vocabulary, "preset": dataclasses.asdict(preset)}
    application.keep_settings(arguments.run_dir, kept)
    rest = len(text) - begin
    values = {
        "this run": result[MEASURE],
        "5-gram model": n_gram(text, begin),
        "xz -9": compressed(text[begin:]) / rest,
        "xz -9 that has seen the training text": (compressed(text) - compressed(text[:begin])) / rest,
    }
    title = f"Bits per character, the last {rest:,} of {len(text):,} characters"
    application.compare(arguments.run_dir, title, MEASURE, values, higher_is_better=False)
    prompt = text[begin : begin + 40]
    sample = write(model, vocabulary, prompt, 300, arguments.seed)
    print(f"\n{prompt}|{sample}")
    attach(arguments.run_dir, "Text that the model wrote", TextSample(text=sample, prompt=prompt))


if __name__ == "__main__":
    main()
