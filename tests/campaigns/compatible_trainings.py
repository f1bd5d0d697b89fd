"""Small trainings with other people's libraries, as their documentation shows them.

Models are made from settings; nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono

SAMPLES = 22
"""Of each data set: batches of 8, 8 and 6 samples in microbatches of 2, the last of which is empty in the short batch."""


@dataclasses.dataclass
class Training:
    """What a ``Trainer`` is made of."""

    model: nn.Module
    loss: Callable[[Any, Any], Any]
    dataset: Any
    optimizer: Callable[[nn.Module], Any] = lambda model: torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2
    )
    scheduler: Callable[[Any], Any] | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: Sequence[unisono.Callback] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A training by name of the packages that it shows."""

    packages: tuple[str, ...]
    make: Callable[[], Training]


CASES: dict[str, Case] = {}


def case(name: str, *packages: str) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    """Adds a training to ``CASES``."""

    def add(make: Callable[[], Training]) -> Callable[[], Training]:
        CASES[name] = Case(packages or (name.split()[0],), make)
        return make

    return add


def _let_torchvision_load() -> None:
    """Its wheel on PyPI is built for CUDA: beside a CPU build of PyTorch its kernels are missing. They are not needed here."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []
if torch.version.cuda is None:
    _let_torchvision_load()

# ---------------------------------------------------------------------- data and losses


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def images(size: int = 16, channels: int = 3, classes: int = 3) -> TensorDataset:
    """Images ``[channels, size, size]`` in 0..1, and labels."""
    generator = _generator()
    pixels = torch.rand(SAMPLES, channels, size, size, generator=generator)
    return TensorDataset(pixels, torch.randint(0, classes, (SAMPLES,), generator=generator))


def masks(size: int = 32) -> TensorDataset:
    """Images, and a mask of each ``[1, size, size]``."""
    generator = _generator()
    pixels = torch.rand(SAMPLES, 3, size, size, generator=generator)
    return TensorDataset(pixels, (torch.rand(SAMPLES, 1, size, size, generator=generator) > 0.5).float())


def points(width: int = 6, classes: int = 3) -> TensorDataset:
    """Rows of numbers, and labels."""
    generator = _generator()
    return TensorDataset(
        torch.randn(SAMPLES, width, generator=generator), torch.randint(0, classes, (SAMPLES,), generator=generator)
    )


def numbers(width: int = 6) -> TensorDataset:
    """Rows of numbers, and a number to predict."""
    rows = torch.randn(SAMPLES, width, generator=_generator())
    return TensorDataset(rows, rows.sin().sum(dim=1))


def tokens(length: int = 12, words: int = 50) -> TensorDataset:
    """Texts, as numbers of words."""
    return TensorDataset(torch.randint(1, words, (SAMPLES, length), generator=_generator()))


def table(columns: int = 3, values: int = 4, width: int = 5) -> TensorDataset:
    """Categories, numbers, labels."""
    generator = _generator()
    return TensorDataset(
        torch.randint(0, values, (SAMPLES, columns), generator=generator),
        torch.randn(SAMPLES, width, generator=generator),
        torch.randint(0, 2, (SAMPLES,), generator=generator),
    )


def classified(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)


def squared(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.mse_loss(model(inputs).reshape(targets.shape), targets, reduction="sum"), len(targets)


class MovingAverage(unisono.Callback):
    """A library's moving average of the weights, updated after each step and kept in checkpoints."""

    edits_weights = False

    def __init__(self, average: Any, update: Callable[[Any, nn.Module], None]) -> None:
        self.average, self.update = average, update

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.update(self.average, trainer.model)

    def state_dict(self) -> dict[str, Any]:
        return {"average": copy.deepcopy(dict(self.average.state_dict()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])


# ---------------------------------------------------------------------- vision


@case("timm resnet")
def _() -> Training:
    return Training(_timm_resnet(drop_path_rate=0.2), classified, images())


def _timm_resnet(**settings: Any) -> nn.Module:
    from timm.models import ResNet
    from timm.models.resnet import BasicBlock

    net: nn.Module = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 16, 16), stem_width=8, **settings)
    return net


@case("timm vit, layer decay, lamb, EMA", "timm")
def _() -> Training:
    import timm.optim
    from timm.models import VisionTransformer
    from timm.utils import ModelEmaV3

    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, drop_path_rate=0.2, proj_drop_rate=0.1
    )
    average = ModelEmaV3(model, decay=0.9)
    return Training(
        model,
        classified,
        images(),
        lambda net: timm.optim.create_optimizer_v2(net, opt="lamb", lr=1e-2, weight_decay=0.05, layer_decay=0.7),
        callbacks=[MovingAverage(average, lambda ema, net: ema.update(net))],
    )


@case("timm mixup in collate_fn", "timm")
def _() -> Training:
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
    soft = SoftTargetCrossEntropy()

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        pixels, labels = torch.utils.data.default_collate(samples)
        return mix(pixels, labels)

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        return soft(model(batch[0]), batch[1]) * len(batch[0]), len(batch[0])

    return Training(_timm_resnet(), loss, images(), settings={"loader": unisono.Loader(collate_fn=collate)})


@case("timm scheduler", "timm")
def _() -> Training:
    from timm.scheduler import CosineLRScheduler

    return Training(_timm_resnet(), classified, images(), scheduler=lambda optimizer: CosineLRScheduler(optimizer, t_initial=6))


@case("timm scheduler in a callback", "timm")
def _() -> Training:
    from timm.scheduler import CosineLRScheduler

    class Schedule(unisono.Callback):
        """The rate follows from the number of the step alone, so there is nothing to save."""

        edits_weights = False

        def on_begin(self, trainer: unisono.Trainer) -> None:
            self.schedule = CosineLRScheduler(trainer.optimizer, t_initial=6, t_in_epochs=False)
            self.schedule.step_update(trainer.position.step)

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            self.schedule.step_update(result.step)

    return Training(_timm_resnet(), classified, images(), callbacks=[Schedule()])


@case("torchvision efficientnet")
def _() -> Training:
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2)]
    return Training(EfficientNet(blocks, dropout=0.2, stochastic_depth_prob=0.3, num_classes=3), classified, images())


@case("torchvision transforms.v2 CutMix", "torchvision")
def _() -> Training:
    from torchvision.models import ShuffleNetV2
    from torchvision.transforms import v2

    mix = v2.RandomChoice([v2.CutMix(num_classes=3), v2.MixUp(num_classes=3)])
    net = ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 16], num_classes=3)
    augment = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2)])

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        return mix(*torch.utils.data.default_collate([(augment(pixels), label) for pixels, label in samples]))

    return Training(net, classified, images(), settings={"loader": unisono.Loader(collate_fn=collate)})


@case("vit-pytorch SimpleViT")
def _() -> Training:
    from vit_pytorch import SimpleViT

    net = SimpleViT(image_size=16, patch_size=4, num_classes=3, dim=32, depth=2, heads=2, mlp_dim=32)
    return Training(net, classified, images())


@case("segmentation-models Unet, DiceLoss", "segmentation_models_pytorch")
def _() -> Training:
    import segmentation_models_pytorch as smp

    dice = smp.losses.DiceLoss(mode="binary")
    net = smp.Unet("mobilenet_v2", encoder_depth=3, encoder_weights=None, decoder_channels=(16, 8, 8), classes=1)
    return Training(net, lambda model, batch: dice(model(batch[0]), batch[1]), masks())


@case("monai UNet, DiceCELoss", "monai")
def _() -> Training:
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    dice = DiceCELoss(sigmoid=True)
    net = UNet(spatial_dims=2, in_channels=3, out_channels=1, channels=(4, 8), strides=(2,), num_res_units=1, dropout=0.1)
    return Training(net, lambda model, batch: dice(model(batch[0]), batch[1]), masks(16))


class _WithMonai(torch.utils.data.Dataset[Any]):
    """MONAI's random transforms draw from generators of their own.

    Args:
        seeded: Whether these are seeded for each sample.
    """

    def __init__(self, *, seeded: bool, state: int | None = None) -> None:
        from monai.transforms import Compose, RandFlip, RandGaussianNoise, RandRotate90

        self.plain, self.seeded = images(), seeded
        self.augment = Compose([RandFlip(prob=0.5, spatial_axis=0), RandRotate90(prob=0.5), RandGaussianNoise(prob=0.5)])
        if state is not None:
            self.augment.set_random_state(seed=state)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> Any:
        pixels, label = self.plain[index]
        if self.seeded:
            self.augment.set_random_state(seed=int(torch.randint(2**31, ())))
        return torch.as_tensor(np.asarray(self.augment(pixels.numpy()))), label


def _of_monai(**settings: Any) -> Callable[[], Training]:
    def make() -> Training:
        from monai.networks.nets import DenseNet

        net = DenseNet(2, 3, 3, init_features=4, growth_rate=4, block_config=(2, 2))
        return Training(net, classified, _WithMonai(**settings))

    return make


CASES["monai random transforms"] = Case(("monai",), _of_monai(seeded=False))
CASES["monai random transforms, seeded once"] = Case(("monai",), _of_monai(seeded=False, state=0))
CASES["monai random transforms, seeded for each sample"] = Case(("monai",), _of_monai(seeded=True))


@case("kornia augmentation in the model", "kornia")
def _() -> Training:
    import kornia.augmentation as K

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = K.AugmentationSequential(
                K.RandomHorizontalFlip(), K.RandomAffine(15.0, p=0.7), K.ColorJiggle(0.2, 0.2, 0.2, 0.1, p=0.8), K.RandomErasing()
            )
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 3))

        def forward(self, pixels: Tensor) -> Tensor:
            with torch.no_grad():
                pixels = self.augment(pixels) if self.training else pixels
            found: Tensor = self.net(pixels)
            return found

    return Training(Net(), classified, images())


@case("kornia augmentation in the dataset", "kornia")
def _() -> Training:
    import kornia.augmentation as K

    augment = K.ImageSequential(K.RandomCrop((12, 12)), K.RandomGaussianNoise(), random_apply=2, random_apply_weights=[0.5, 0.5])

    class Augmented(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.plain = images()

        def __len__(self) -> int:
            return len(self.plain)

        def __getitem__(self, index: int) -> Any:
            pixels, label = self.plain[index]
            return augment(pixels[None])[0][:, :12, :12], label

    return Training(nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 3)), classified, Augmented())


# ---------------------------------------------------------------------- representations


def _two_views(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels + 0.1 * torch.randn_like(pixels), pixels.flip(3) + 0.1 * torch.randn_like(pixels)


def _backbone(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, width))


@case("lightly SimCLR", "lightly")
def _() -> Training:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    criterion = NTXentLoss()
    net = nn.Sequential(_backbone(), SimCLRProjectionHead(16, 16, 8))
    return Training(
        net, lambda model, batch: criterion(*map(model, _two_views(batch[0]))), images(), settings={"microbatches": 3}
    )


class _Byol(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.net = nn.Sequential(_backbone(), BYOLProjectionHead(16, 16, 8))
        self.predict = BYOLPredictionHead(8, 8, 8)
        self.teacher = copy.deepcopy(self.net)
        deactivate_requires_grad(self.teacher)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.predict(self.net(pixels))
        return found


def _byol_loss(model: _Byol, batch: Any) -> Tensor:
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()
    one, two = _two_views(batch[0])
    with torch.no_grad():
        targets = model.teacher(one), model.teacher(two)
    found: Tensor = 0.5 * (criterion(model(one), targets[1]) + criterion(model(two), targets[0]))
    return found


@case("lightly BYOL, update_momentum in a callback", "lightly")
def _() -> Training:
    class Follow(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            from lightly.models.utils import update_momentum

            update_momentum(trainer.model.net, trainer.model.teacher, m=0.9)

    sync = unisono.Exact(replicate_kib=0, share_weights=False)
    return Training(_Byol(), _byol_loss, images(), callbacks=[Follow()], settings={"microbatches": 3, "sync": sync})


@case("lightly BYOL, update_momentum in the loss", "lightly")
def _() -> Training:
    def loss(model: _Byol, batch: Any) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(model.net, model.teacher, m=0.9)
        return _byol_loss(model, batch)

    return Training(_Byol(), loss, images(), settings={"microbatches": 3})


class _Dino(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        self.net, self.teacher = (nn.Sequential(_backbone(), DINOProjectionHead(16, 16, 8, 12)) for _ in range(2))
        self.teacher.requires_grad_(False)
        criterion = DINOLoss(output_dim=12, warmup_teacher_temp_epochs=2)
        if inside:
            self.criterion = criterion
        else:
            self.__dict__["criterion"] = criterion  # beside the model, as lightly's examples have it

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.net(pixels)
        return found


def _dino_loss(model: _Dino, batch: Any) -> Tensor:
    views = _two_views(batch[0])
    with torch.no_grad():
        targets = [model.teacher(view) for view in views]
    found: Tensor = model.criterion(targets, [model(view) for view in views], epoch=0)
    return found


@case("lightly DINOLoss inside the model", "lightly")
def _() -> Training:
    return Training(_Dino(inside=True), _dino_loss, images(), settings={"microbatches": 3})


@case("lightly DINOLoss beside the model", "lightly")
def _() -> Training:
    return Training(_Dino(inside=False), _dino_loss, images(), settings={"microbatches": 3})


@case("lightly memory bank", "lightly")
def _() -> Training:
    from lightly.loss import NTXentLoss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _backbone()
            self.criterion = NTXentLoss(memory_bank_size=(16, 16))

        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = self.net(pixels)
            return found

    def loss(model: Net, batch: Any) -> Tensor:
        found: Tensor = model.criterion(*map(model, _two_views(batch[0])))
        return found

    return Training(Net(), loss, images(), settings={"microbatches": 3})


@case("metric-learning triplets, miner", "pytorch-metric-learning")
def _() -> Training:
    from pytorch_metric_learning import losses, miners

    criterion, miner = losses.TripletMarginLoss(), miners.MultiSimilarityMiner()
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(batch[0])
        value: Tensor = criterion(found, batch[1], miner(found, batch[1]))
        return value

    return Training(net, loss, points(classes=2), settings={"microbatches": 3})


@case("metric-learning ArcFace, its weights trained", "pytorch-metric-learning")
def _() -> Training:
    from pytorch_metric_learning import losses

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
            self.criterion = losses.ArcFaceLoss(num_classes=3, embedding_size=8)

        def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = self.criterion(self.net(rows), labels)
            return found

    return Training(Net(), lambda model, batch: model(*batch), points())


@case("metric-learning CrossBatchMemory", "pytorch-metric-learning")
def _() -> Training:
    from pytorch_metric_learning import losses

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
            self.criterion = losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=8, memory_size=16)

        def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = self.criterion(self.net(rows), labels)
            return found

    return Training(Net(), lambda model, batch: model(*batch), points(classes=2), settings={"microbatches": 3})


@case("open_clip CLIP, ClipLoss", "open_clip_torch")
def _() -> Training:
    from open_clip import CLIP, ClipLoss

    net = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        text_cfg={"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    )
    criterion = ClipLoss()
    pairs = TensorDataset(images().tensors[0], tokens().tensors[0])
    return Training(net, lambda model, batch: criterion(*model(*batch)), pairs, settings={"microbatches": 3})


@functools.cache
def _small_bert(folder: str) -> str:
    """A tiny BERT with a tokenizer of single letters, in a folder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    Path(folder, "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


_FOLDER = tempfile.TemporaryDirectory(prefix="unisono-compatibility-")


@case("sentence-transformers")
def _() -> Training:
    from sentence_transformers import SentenceTransformer, losses, models

    word = models.Transformer(_small_bert(_FOLDER.name))
    net = SentenceTransformer(modules=[word, models.Pooling(32)], device="cpu")
    criterion = losses.MultipleNegativesRankingLoss(net)
    generator = np.random.default_rng(5)
    texts = [["".join(generator.choice(list("abcdefgh"), 6)) for _ in range(2)] for _ in range(SAMPLES)]

    def collate(samples: list[list[str]]) -> Any:
        return [dict(net.tokenize(list(side))) for side in zip(*samples, strict=True)]

    def loss(model: Any, batch: Any) -> Tensor:
        found: Tensor = criterion([dict(side) for side in batch], None)
        return found

    return Training(net, loss, texts, settings={"microbatches": 3, "loader": unisono.Loader(collate_fn=collate)})


# ---------------------------------------------------------------------- text


@case("x-transformers decoder")
def _() -> Training:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True, ff_glu=True, attn_dropout=0.1, layer_dropout=0.1)
    net = AutoregressiveWrapper(TransformerWrapper(num_tokens=50, max_seq_len=12, attn_layers=layers), mask_prob=0.15)
    return Training(net, lambda model, batch: model(batch[0]), tokens())


@case("st-moe-pytorch")
def _() -> Training:
    from st_moe_pytorch import MoE, SparseMoEBlock

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 16)
            self.block = SparseMoEBlock(MoE(dim=16, num_experts=4), add_ff_before=True, add_ff_after=True)
            self.out = nn.Linear(16, 50)

        def forward(self, text: Tensor) -> Tensor:
            x, auxiliary, *_ = self.block(self.words(text[:, :-1]))
            found: Tensor = F.cross_entropy(self.out(x).flatten(0, 1), text[:, 1:].flatten()) + auxiliary
            return found

    return Training(Net(), lambda model, batch: model(batch[0]), tokens())


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    net: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    return net


def _language(model: Any, batch: Any) -> tuple[Tensor, int]:
    (text,) = batch
    logits = model(input_ids=text).logits[:, -text.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="sum"), text[:, 1:].numel()


def _peft(name: str, config: Callable[[Any], Any]) -> None:
    def make() -> Training:
        import peft

        return Training(peft.get_peft_model(_gpt2(), config(peft)), _language, tokens())

    CASES[f"peft {name}"] = Case(("peft", "transformers"), make)


_TASK = {"task_type": "CAUSAL_LM"}
_peft("LoRA", lambda peft: peft.LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, **_TASK))
_peft("DoRA", lambda peft: peft.LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True, **_TASK))
_peft("VeRA", lambda peft: peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **_TASK))
_peft("AdaLoRA", lambda peft: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, target_modules=["c_attn"], **_TASK))
_peft("prompt tuning", lambda peft: peft.PromptTuningConfig(num_virtual_tokens=3, **_TASK))
_peft("prefix tuning", lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=3, **_TASK))
_peft("(IA)3", lambda peft: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True, **_TASK))


@case("perceiver-pytorch")
def _() -> Training:
    from perceiver_pytorch import Perceiver

    net = Perceiver(
        input_channels=3, input_axis=2, num_freq_bands=2, max_freq=4.0, depth=2, num_latents=4, latent_dim=16, num_classes=3,
        attn_dropout=0.1, cross_dim_head=8, latent_dim_head=8, latent_heads=2,
    )  # fmt: skip
    return Training(net, lambda model, batch: classified(model, (batch[0].permute(0, 2, 3, 1), batch[1])), images(8))


# ---------------------------------------------------------------------- graphs


class _Molecules(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        from torch_geometric.data import Data

        generator = _generator()
        self.graphs = []
        for number in range(SAMPLES):
            nodes = 3 + number % 5
            edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
            self.graphs.append(Data(x=torch.randn(nodes, 4, generator=generator), edge_index=edges, y=torch.tensor([number % 3])))

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Any:
        return self.graphs[index]


def _graph_net(kind: str) -> Callable[[], Training]:
    def make() -> Training:
        import torch_geometric.nn as gnn
        from torch_geometric.data import Batch

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = getattr(gnn.models, kind)(4, 16, 2, 3, dropout=0.2, norm="BatchNorm")

            def forward(self, graph: Any) -> Tensor:
                nodes = self.net(graph.x, graph.edge_index)
                found: Tensor = gnn.global_mean_pool(nodes, graph.batch, size=graph.num_graphs)
                return found

        def loss(model: Any, graph: Any) -> tuple[Tensor, int]:
            return F.cross_entropy(model(graph), graph.y, reduction="sum"), graph.num_graphs

        loader = unisono.Loader(collate_fn=Batch.from_data_list)
        return Training(Net(), loss, _Molecules(), settings={"loader": loader})

    return make


for _kind in ("GIN", "GAT", "GraphSAGE"):
    CASES[f"torch_geometric {_kind}"] = Case(("torch-geometric",), _graph_net(_kind))


@case("e3nn", "e3nn")
def _() -> Training:
    from e3nn import o3
    from e3nn.nn import BatchNorm, Gate

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate("8x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
            self.first = o3.FullyConnectedTensorProduct("1x1o", "1x0e + 1x1o", self.gate.irreps_in)
            self.norm = BatchNorm(self.gate.irreps_out)
            self.last = o3.Linear(self.gate.irreps_out, "3x0e")

        def forward(self, rows: Tensor) -> Tensor:
            around = o3.spherical_harmonics("1x0e + 1x1o", rows[:, 3:], normalize=True)
            found: Tensor = self.last(self.norm(self.gate(self.first(rows[:, :3], around))))
            return found

    return Training(Net(), classified, points())


# ---------------------------------------------------------------------- tables


@case("pytorch-tabnet")
def _() -> Training:
    from pytorch_tabnet.tab_network import TabNet

    net = TabNet(6, 3, n_d=8, n_a=8, n_steps=2, virtual_batch_size=2, group_attention_matrix=torch.eye(6))

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        logits, sparsity = model(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="sum") - 1e-3 * sparsity * len(logits), len(logits)

    return Training(net, loss, points())


def _of_table(model: Any, batch: Any) -> tuple[Tensor, int]:
    words, rows, labels = batch
    return F.binary_cross_entropy_with_logits(model(words, rows).squeeze(1), labels.float(), reduction="sum"), len(labels)


@case("tab-transformer-pytorch")
def _() -> Training:
    from tab_transformer_pytorch import TabTransformer

    net = TabTransformer(categories=(4, 4, 4), num_continuous=5, dim=8, depth=1, heads=2, ff_dropout=0.1, mlp_act=nn.ReLU())
    return Training(net, _of_table, table())


@case("rtdl FTTransformer", "rtdl_revisiting_models")
def _() -> Training:
    from rtdl_revisiting_models import FTTransformer

    net = FTTransformer(
        n_cont_features=5, cat_cardinalities=[4, 4, 4], d_out=1, n_blocks=1, d_block=16, attention_n_heads=2,
        attention_dropout=0.2, ffn_d_hidden=None, ffn_d_hidden_multiplier=1.5, ffn_dropout=0.1, residual_dropout=0.1,
    )  # fmt: skip
    return Training(
        net,
        lambda model, batch: _of_table(lambda words, rows: model(rows, words), batch),
        table(),
        lambda model: torch.optim.AdamW(model.make_parameter_groups(), lr=1e-2, weight_decay=1e-2),
    )


@case("skorch module", "skorch")
def _() -> Training:
    from skorch import NeuralNetClassifier

    made = NeuralNetClassifier(
        nn.Sequential, module__args=(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, optimizer__lr=0.1
    ).set_params(module=lambda **_: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3)))
    made.initialize()
    return Training(made.module_, classified, points(), lambda model: made.optimizer_)


# ---------------------------------------------------------------------- probability, equations, spikes


@case("gpytorch SVGP")
def _() -> Training:
    import gpytorch

    class Net(gpytorch.models.ApproximateGP):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            inducing = torch.randn(5, 6)
            distribution = gpytorch.variational.CholeskyVariationalDistribution(5)
            super().__init__(gpytorch.variational.VariationalStrategy(self, inducing, distribution))
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()
            self.__dict__["criterion"] = gpytorch.mlls.VariationalELBO(self.likelihood, self, num_data=SAMPLES)

        def forward(self, rows: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(rows), self.kernel(rows))

    return Training(Net(), lambda model, batch: -model.criterion(model(batch[0]), batch[1]), numbers())


@case("gpytorch SVGP, called once before", "gpytorch")
def _() -> Training:
    made = CASES["gpytorch SVGP"].make()
    made.model.train()(made.dataset.tensors[0][:2])
    return made


@case("gpytorch NGD, called once before", "gpytorch")
def _() -> Training:
    import gpytorch

    made = CASES["gpytorch SVGP"].make()
    distribution = gpytorch.variational.NaturalVariationalDistribution(5)
    made.model.variational_strategy._variational_distribution = distribution
    made.model.train()(made.dataset.tensors[0][:2])
    for parameter in made.model.hyperparameters():
        parameter.requires_grad_(False)
    made.optimizer = lambda model: gpytorch.optim.NGD(model.variational_parameters(), num_data=SAMPLES, lr=0.1)
    return made


@case("zuko spline flow", "zuko")
def _() -> Training:
    import zuko

    net = zuko.flows.NSF(features=6, context=0, transforms=2, hidden_features=(16, 16))
    return Training(net, lambda model, batch: (-model().log_prob(batch[0]).sum(), len(batch[0])), points())


@case("torchdiffeq, adjoint", "torchdiffeq")
def _() -> Training:
    from torchdiffeq import odeint_adjoint

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
            self.evaluations = 0

        def forward(self, time: Tensor, state: Tensor) -> Tensor:
            self.evaluations += 1
            found: Tensor = self.net(state)
            return found

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.out = Slope(), nn.Linear(6, 3)

        def forward(self, rows: Tensor) -> Tensor:
            states = odeint_adjoint(self.slope, rows, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-4)
            found: Tensor = self.out(states[1])
            return found

    return Training(Net(), classified, points())


@case("neuralop FNO, complex weights", "neuraloperator")
def _() -> Training:
    from neuralop.models import FNO

    net = FNO(n_modes=(4, 4), hidden_channels=8, in_channels=3, out_channels=1, n_layers=2)
    return Training(net, lambda model, batch: (F.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0])), masks(16))


@case("geotorch orthogonal weights", "geotorch")
def _() -> Training:
    import geotorch

    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    geotorch.orthogonal(net[0], "weight")
    return Training(net, classified, points())


def _spiking(*, plain: bool) -> Callable[[], Training]:
    def make() -> Training:
        import snntorch
        from snntorch import surrogate, utils

        net = nn.Sequential(
            nn.Linear(6, 16),
            snntorch.Leaky(beta=0.9, spike_grad=surrogate.fast_sigmoid(), init_hidden=True, learn_beta=True),
            nn.Linear(16, 3),
            snntorch.Leaky(beta=0.9, init_hidden=True, output=True),
        )
        for layer in net if plain else ():
            if "mem" in layer._buffers:
                layer.mem = layer._buffers.pop("mem")

        def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
            utils.reset(model)
            total: Any = 0.0
            for _ in range(4):
                _, membrane = model(batch[0])
                total = total + F.cross_entropy(membrane, batch[1], reduction="sum")
            return total, len(batch[0])

        return Training(net, loss, points())

    return make


CASES["snntorch"] = Case(("snntorch",), _spiking(plain=False))
CASES["snntorch, membranes as plain attributes"] = Case(("snntorch",), _spiking(plain=True))

# ---------------------------------------------------------------------- images that are made


@case("diffusers UNet, EMA", "diffusers")
def _() -> Training:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), dropout=0.1,
    )  # fmt: skip
    noise = DDPMScheduler(num_train_timesteps=20)

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        (pixels, _), count = batch, len(batch[0])
        target, times = torch.randn_like(pixels), torch.randint(0, 20, (count,))
        predicted = model(noise.add_noise(pixels, target, times), times).sample
        return F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3)).sum(), count

    average = EMAModel(net.parameters(), decay=0.9)
    return Training(net, loss, images(8), callbacks=[MovingAverage(average, lambda ema, model: ema.step(model.parameters()))])


@case("denoising-diffusion-pytorch")
def _() -> Training:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2), flash_attn=False, dropout=0.1), image_size=8, timesteps=20)
    return Training(net, lambda model, batch: model(batch[0]), images(8))


@case("vector-quantize-pytorch, EMA codebook", "vector-quantize-pytorch")
def _() -> Training:
    from vector_quantize_pytorch import VectorQuantize

    return _autoencoder(VectorQuantize(dim=8, codebook_size=6, decay=0.8, commitment_weight=1.0))


@case("vector-quantize-pytorch, k-means start", "vector-quantize-pytorch")
def _() -> Training:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim=8, codebook_size=6, decay=0.8, kmeans_init=True, threshold_ema_dead_code=1)
    return _autoencoder(quantizer)


@case("vector-quantize-pytorch FSQ", "vector-quantize-pytorch")
def _() -> Training:
    from vector_quantize_pytorch import FSQ

    return _autoencoder(FSQ(levels=[5, 4], dim=8))


def _autoencoder(quantizer: nn.Module) -> Training:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.quantizer, self.decode = nn.Linear(6, 8), quantizer, nn.Linear(8, 6)

        def forward(self, rows: Tensor) -> Tensor:
            quantized, _, *rest = self.quantizer(self.encode(rows)[:, None])
            found: Tensor = F.mse_loss(self.decode(quantized[:, 0]), rows) + (rest[0].sum() if rest else 0.0)
            return found

    return Training(Net(), lambda model, batch: model(batch[0]), points())


# ---------------------------------------------------------------------- frameworks around the loop


@case("lightning module, training_step as loss", "lightning", "torchmetrics")
def _() -> Training:
    import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Training(
        Net(), lambda model, batch: model.training_step(batch, 0), points(), lambda model: model.configure_optimizers()
    )


@case("torchmetrics inside the model", "torchmetrics")
def _() -> Training:
    import torchmetrics

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

        def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
            logits = self.net(rows)
            self.accuracy(logits, labels)
            return F.cross_entropy(logits, labels)

    return Training(Net(), lambda model, batch: model(*batch), points())


@case("opacus DPOptimizer", "opacus")
def _() -> Training:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net = GradSampleModule(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)))

    def optimizer(model: nn.Module) -> Any:
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        return DPOptimizer(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8)

    return Training(net, classified, points(), optimizer)


@case("ema-pytorch", "ema-pytorch")
def _() -> Training:
    from ema_pytorch import EMA

    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    average = EMA(net, beta=0.9, update_every=2, update_after_step=1, include_online_model=False)
    return Training(net, classified, points(), callbacks=[MovingAverage(average, lambda ema, _: ema.update())])


@case("lion-pytorch")
def _() -> Training:
    from lion_pytorch import Lion

    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return Training(net, classified, points(), lambda model: Lion(model.parameters(), lr=1e-2, weight_decay=1e-2))


@case("einops layers", "einops")
def _() -> Training:
    from einops.layers.torch import EinMix, Rearrange, Reduce

    net = nn.Sequential(
        Rearrange("b c (h i) (w j) -> b (h w) (i j c)", i=4, j=4),
        EinMix("b t c -> b t d", weight_shape="c d", bias_shape="d", c=48, d=16),
        nn.GELU(),
        Reduce("b t d -> b d", "mean"),
        nn.Linear(16, 3),
    )
    return Training(net, classified, images())


@case("pytorch-forecasting N-BEATS", "pytorch-forecasting")
def _() -> Training:
    from pytorch_forecasting.models.nbeats.sub_modules import NBEATSGenericBlock

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                NBEATSGenericBlock(units=16, thetas_dim=4, num_block_layers=2, backcast_length=6, forecast_length=1)
                for _ in range(2)
            )

        def forward(self, rows: Tensor) -> Tensor:
            total: Any = 0.0
            for block in self.blocks:
                backcast, forecast = block(rows)
                rows, total = rows - backcast, total + forecast
            found: Tensor = total
            return found

    return Training(Net(), squared, numbers())
