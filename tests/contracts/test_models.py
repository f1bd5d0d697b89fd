"""Models as people have them: BERT, GPT-2, T5 and ViT of the transformers library, tiny, with dropout, from a configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.reference.harness import Outcome, Samples, Setup, assert_same_bits, in_unison

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SAMPLES, LENGTH, WORDS = 28, 10, 31


def text(*, labels: str) -> Samples:
    """Ragged sentences that count upwards, so there is something to learn; -100 where nothing is to be said."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(1, WORDS, (SAMPLES, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH)) % (WORDS - 2) + 2
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (SAMPLES, 1), generator=generator)
    tokens = torch.where(mask, tokens, 0)
    hidden = (torch.rand(tokens.shape, generator=generator) < 0.3) & mask
    targets = {
        "next": torch.where(mask, tokens, -100),  # shifted by the loss
        "masked": torch.where(hidden, tokens, -100),
        "translation": torch.where(mask, (tokens + 1) % WORDS, -100)[:, :6],
    }[labels]
    inputs = torch.where(hidden, 1, tokens) if labels == "masked" else tokens
    return Samples({"input_ids": inputs, "attention_mask": mask.long(), "labels": targets})


def images() -> Samples:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % 3
    pixels = torch.randn(SAMPLES, 1, 12, 12, generator=generator) + labels.view(-1, 1, 1, 1)
    return Samples({"pixel_values": pixels, "labels": labels})


def token_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed over the tokens that have a label."""
    labels = batch["labels"]
    given = {key: value for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = F.pad(labels[:, :-1].clamp(min=0), (1, 0))
    logits = model(**given).logits
    if model.config.model_type == "gpt2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"), (labels != -100).sum()


def image_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    labels = batch["labels"]
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, labels, reduction="sum"), len(labels)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, pad_token_id=0
    )
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=24, n_layer=2, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3, decoder_start_token_id=0, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return transformers.ViTForImageClassification(config)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Any]
    data: Callable[[], Samples]
    tied: tuple[str, str] | None = None
    precision: str = "fp32"

    def setup(self) -> Setup:
        torch.manual_seed(3)
        model = self.model().train()
        assert any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain}], lr=1e-2)
        return Setup(model, optimizer, self.loss, CosineAnnealingLR(optimizer, 20))

    def run(self, workers: int) -> Outcome:
        settings: dict[str, Any] = {"max_grad_norm": 1.0, "precision": self.precision}
        return in_unison(workers, self.setup, self.data(), batch_size=8, microbatches=4, epochs=4, **settings)


BERT = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
GPT2 = ("transformer.wte.weight", "lm_head.weight")
CASES = [
    Case("bert", bert, token_loss, lambda: text(labels="masked"), BERT),
    Case("gpt2", gpt2, token_loss, lambda: text(labels="next"), GPT2),
    Case("gpt2, bf16", gpt2, token_loss, lambda: text(labels="next"), GPT2, precision="bf16"),
    Case("t5", t5, token_loss, lambda: text(labels="translation"), ("shared.weight", "encoder.embed_tokens.weight")),
    Case("vit", vit, image_loss, images),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_model_of_transformers_learns_and_is_bit_equal_on_one_to_four_workers(case: Case) -> None:
    one = case.run(1)
    for workers in (2, 3, 4):
        assert_same_bits(one, case.run(workers), f"{case.name}, {workers} workers")
    assert len(one.losses) == 16
    assert sum(one.losses[-4:]) < 0.9 * sum(one.losses[:4]), one.losses
    assert all(tensor.dtype != torch.bfloat16 for tensor in one.state.values())
    if case.tied:
        assert torch.equal(one.state[case.tied[0]], one.state[case.tied[1]])


def test_bf16_is_a_different_computation() -> None:
    full, half = CASES[1].run(1), CASES[2].run(1)
    assert full.losses[0] != half.losses[0]
    assert half.losses[0] == pytest.approx(full.losses[0], rel=1e-2)
