"""Tiny models and data for what people fine-tune, made from configurations: nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import Dataset

VOCABULARY = 40
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": VOCABULARY}


def tokenizer() -> Any:
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]", "bos_token": "[EOS]", "unk_token": "[PAD]"}
    words = ["[PAD]", "[MASK]", "[EOS]", *(f"w{n}" for n in range(3, VOCABULARY))]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


class Samples(Dataset[Any]):
    """Sequences of 4 to 9 words (or images), with what the task wants to know about each."""

    def __init__(self, describe: Callable[[torch.Generator, int], dict[str, Any]], length: int = 22, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._samples = [describe(generator, n) for n in range(length)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._samples[index])


def _words(generator: torch.Generator, shortest: int = 4) -> list[int]:
    length = int(torch.randint(shortest, 10, (), generator=generator))
    found: list[int] = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return found


def _classes(generator: torch.Generator, n: int) -> dict[str, Any]:
    return {"input_ids": _words(generator), "labels": n % 3, "unused": "text"}


def _numbers(generator: torch.Generator, n: int) -> dict[str, Any]:
    return {"input_ids": _words(generator), "labels": float(torch.randn((), generator=generator))}


def _tags(generator: torch.Generator, n: int) -> dict[str, Any]:
    words = _words(generator)
    return {"input_ids": words, "labels": [-100, *(word % 3 for word in words[1:])]}


def _spans(generator: torch.Generator, n: int) -> dict[str, Any]:
    # Of equal lengths: the loss is taken over all positions, those that are filled up included.
    return {"input_ids": _words(generator, 9), "start_positions": n % 2, "end_positions": 2 + n % 2}


def _text(generator: torch.Generator, n: int) -> dict[str, Any]:
    return {"input_ids": _words(generator)}


def _pairs(generator: torch.Generator, n: int) -> dict[str, Any]:
    return {"input_ids": _words(generator), "labels": _words(generator, 2)}


def _images(generator: torch.Generator, n: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": n % 3}


def _bert(kind: str, dropout: float, **more: Any) -> Any:
    config = transformers.BertConfig(**TEXT, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **more)
    return getattr(transformers, f"BertFor{kind}")(config)


def _gpt(dropout: float) -> Any:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, **rates)
    return transformers.GPT2LMHeadModel(config)


def _lora(dropout: float) -> Any:
    import peft

    config = peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(_gpt(dropout), config)


def _t5(dropout: float) -> Any:
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, dropout_rate=dropout, **sizes, **ids)
    )


def _vit(dropout: float) -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    config = transformers.ViTConfig(image_size=8, patch_size=4, hidden_dropout_prob=dropout, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


def _causal(tokens: Any) -> Any:
    return transformers.DataCollatorForLanguageModeling(tokens, mlm=False)


def _masked(tokens: Any) -> Any:
    return transformers.DataCollatorForLanguageModeling(tokens, mlm_probability=0.3)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is fine-tuned."""

    describe: Callable[[torch.Generator, int], dict[str, Any]]
    model: Callable[[float], Any]
    """By its dropout rate."""
    collator: Callable[[Any], Any] = transformers.DataCollatorWithPadding
    """By its tokenizer."""
    is_random: bool = False
    """Whether the collator draws random numbers."""
    is_seq2seq: bool = False

    def make(self, dropout: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = self.model(dropout)
        return made

    def data(self, length: int = 22, seed: int = 0) -> Samples:
        return Samples(self.describe, length, seed)


TASKS = {
    "sequence classification": Task(_classes, lambda rate: _bert("SequenceClassification", rate, num_labels=3)),
    "regression": Task(_numbers, lambda rate: _bert("SequenceClassification", rate, num_labels=1)),
    "token classification": Task(
        _tags,
        lambda rate: _bert("TokenClassification", rate, num_labels=3),
        transformers.DataCollatorForTokenClassification,
    ),
    "question answering": Task(_spans, lambda rate: _bert("QuestionAnswering", rate)),
    "causal language model": Task(_text, _gpt, _causal),
    "masked language model": Task(_text, lambda rate: _bert("MaskedLM", rate), _masked, is_random=True),
    "LoRA": Task(_text, _lora, _causal),
    "sequence to sequence": Task(_pairs, _t5, transformers.DataCollatorForSeq2Seq, is_seq2seq=True),
    "image classification": Task(_images, _vit, lambda tokens: transformers.default_data_collator),
}
