"""Vision: a convolutional net on Fashion-MNIST, 60,000 photographs of clothes in 28 x 28 pixels and ten classes.

BatchNorm, augmentation (moved by up to two pixels, mirrored), dropout and a one-cycle schedule.

    unisono demo vision --workers 2
    unisono demo vision --data folder/         # four files in the format of MNIST
    unisono demo vision --predict shirt.png    # any image: made grey and square, bright on dark
"""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from unisono.demos import _application as application
from unisono.demos._data import Download, Source, obtain
from unisono.report import charts
from unisono.report.attachments import attach

MICROBATCHES = 4
SIDE = 28
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MEAN, STD = 0.2860, 0.3530
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST = Source(
    name="Fashion-MNIST",
    folder="fashion-mnist",
    installed=(Path("/usr/share/datasets/fashion-mnist"),),
    install="apt-get install dataset-fashion-mnist",
    downloads=tuple(
        Download(url=ADDRESS + name, size=size, sha256=sha256)
        for name, size, sha256 in (
            ("train-images-idx3-ubyte.gz", 26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("train-labels-idx1-ubyte.gz", 29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("t10k-images-idx3-ubyte.gz", 4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("t10k-labels-idx1-ubyte.gz", 5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        )
    ),
)
PUBLISHED = {
    "published: WRN-28-10 with random erasing": 0.963,
    "published: ResNet18": 0.949,
    "published: 2 convolutions, under 100,000 parameters": 0.925,
    "published: 3 convolutions, pooling, BatchNorm": 0.903,
    "published: people": 0.835,
}
"""From the table in the data set's own README; as it says there, submitted and not verified."""


class ClothesNet(nn.Module):
    """Images ``uint8 [N, 28, 28]`` to logits ``[N, 10]``; augments while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._block(1, 32),
            *self._block(32, 64),
            *self._block(64, 128),
            nn.Conv2d(128, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 9, 10))

    @staticmethod
    def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
        # Pooled first: what follows has a quarter of the work.
        return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(out), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 255 - MEAN) / STD
        if self.training:
            pixels = moved(pixels)
        # Convolutions of many channels are faster where channels lie together.
        first = self.features[0](pixels[:, None]).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.features[1:](first))
        return logits


def moved(pixels: Tensor) -> Tensor:
    """Each image shifted by up to two pixels and mirrored half of the time, by torch's random numbers of this microbatch."""
    count = len(pixels)
    padded = F.pad(pixels, (2, 2, 2, 2), value=-MEAN / STD)
    down, right = torch.randint(0, 5, (2, count, 1))
    along = torch.arange(SIDE)
    columns = torch.where(torch.rand(count, 1) < 0.5, along, SIDE - 1 - along) + right
    return padded[torch.arange(count)[:, None, None], (along + down)[:, :, None], columns[:, None, :]]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum", label_smoothing=0.05), len(labels)


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).sum(), len(labels)


def read_idx(file: Path) -> Tensor:
    """A file in the format of MNIST: magic number with the count of dimensions, sizes, bytes.

    Raises:
        DataError: The file is missing, damaged or of another kind.
    """
    try:
        with gzip.open(file) as packed:
            data = packed.read()
    except (OSError, EOFError) as error:
        raise unisono.DataError(f"{file} cannot be read: {error}") from None
    dimensions = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    sizes = np.frombuffer(data, ">u4", dimensions, 4).tolist() if len(data) >= 4 + 4 * dimensions else []
    if not dimensions or len(data) - 4 - 4 * dimensions != np.prod(sizes):
        raise unisono.DataError(
            f"{file} is not a complete MNIST file: it has {len(data):,} bytes and begins with {data[:4].hex()!r}"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy())


def load(folder: Path, part: str) -> TensorDataset:
    """Images ``uint8 [N, 28, 28]`` and labels ``int64 [N]``.

    Raises:
        DataError: Images and labels do not fit each other or the net.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
    if images.shape != (len(labels), SIDE, SIDE) or labels.dim() != 1 or not len(labels):
        raise unisono.DataError(
            f"{folder}: {part} has images {list(images.shape)} and labels {list(labels.shape)}, not [N, 28, 28]"
        )
    if labels.max() >= len(CLASSES):
        raise unisono.DataError(
            f"{folder}: label {labels.max()} of {part} number {labels.argmax()} is not one of the ten classes"
        )
    if part == "train" and labels.min() == labels.max():
        raise unisono.DataError(f"{folder}: all {len(labels):,} labels of {part} are {labels[0]}: there is nothing to tell apart")
    return TensorDataset(images, labels)


def logistic_regression(train: TensorDataset, test: TensorDataset) -> float:
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (test_x, test_y) = (
        ((images.flatten(1).float() / 255).numpy(), labels.numpy()) for images, labels in (train.tensors, test.tensors)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: more iterations do not make it better
        return float(LogisticRegression(max_iter=50).fit(train_x, train_y).score(test_x, test_y))


def read_image(file: str) -> Tensor:
    """Any image as one of the data set: grey, bright on dark, 28 x 28."""
    from PIL import Image, UnidentifiedImageError

    try:
        grey = Image.open(file).convert("L")
    except (OSError, UnidentifiedImageError) as error:
        raise unisono.DataError(f"{file} is not a readable image: {error}") from None
    pixels = np.asarray(grey.resize((SIDE, SIDE)))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return torch.from_numpy(255 - pixels if np.median(border) > 127 else pixels.copy())


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in torch.split(images, 500)])


def predict(run_dir: str, file: str) -> None:
    """Prints the three most likely classes of an image file."""
    application.trained(run_dir, "vision")
    model = ClothesNet()
    application.load_weights(model, run_dir)
    probabilities = F.softmax(logits_of(model, read_image(file)[None])[0], dim=0)
    for probability, place in zip(*probabilities.topk(3), strict=True):
        print(f"{CLASSES[place]:<12} {probability:.1%}")


def main() -> None:
    parser = application.options(
        "vision",
        "Train a convolutional net on pictures of clothes.",
        epochs=14,
        batch_size=256,
        data="a folder with four files in the format of MNIST; default: Fashion-MNIST",
        predict="classify image file X",
    )
    arguments = parser.parse_args()
    world = unisono.World.from_environment().at_most(MICROBATCHES)
    if arguments.predict is not None:
        return predict(arguments.run_dir, arguments.predict) if world.is_main else None

    folder = obtain(FASHION_MNIST, arguments.data, world)
    train, test = load(folder, "train"), load(folder, "t10k")
    torch.manual_seed(arguments.seed)
    model = ClothesNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02)
    steps = arguments.epochs * -(-len(train) // arguments.batch_size)
    shown = application.Evaluation(test, {"accuracy": accuracy}, batch_size=500, every=2, epochs=arguments.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    settings = application.settings(arguments, MICROBATCHES)
    trainer = unisono.Trainer(model, optimizer, loss, scheduler=schedule, callbacks=[shown], **settings)
    trainer.fit(train, epochs=arguments.epochs)
    result = shown.measure(trainer)
    if not trainer.world.is_main:
        return
    application.keep_settings(arguments.run_dir, {"demo": "vision"})
    values = {"this run": result["accuracy"], "logistic regression": logistic_regression(train, test)}
    title = f"Test accuracy on {len(test):,} images"
    published = PUBLISHED if arguments.data is None else {}
    application.compare(arguments.run_dir, title, "accuracy", values | published, higher_is_better=True)
    images, labels = test.tensors
    found = logits_of(model, images).argmax(dim=1)
    counts = torch.bincount(labels * len(CLASSES) + found, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    attach(arguments.run_dir, "What was taken for what", charts.confusion_matrix(CLASSES, counts.tolist()))


if __name__ == "__main__":
    main()
