"""BERT from transformers, masked language modelling; the masks are drawn when a batch is collated."""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

import unisono


def collate(samples):
    tokens = torch.stack(samples)
    masked = torch.rand(tokens.shape) < 0.3
    return {"input_ids": tokens.masked_fill(masked, 3), "labels": tokens.masked_fill(~masked, -100)}


def loss(model, batch):
    logits, labels = model(batch["input_ids"]).logits, batch["labels"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


if __name__ == "__main__":
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertForMaskedLM(config)
    data = list(torch.randint(4, 100, (96, 16)))
    trainer = unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        loss,
        batch_size=24,
        microbatches=8,
        max_grad_norm=1.0,
        loader=unisono.Loader(collate_fn=collate),
    )
    trainer.fit(data, epochs=3)
