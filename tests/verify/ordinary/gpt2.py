"""GPT-2 from transformers: tied weights, dropout, the loss summed over tokens."""

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import unisono


def loss(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel()


if __name__ == "__main__":
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    data = list(torch.randint(0, 100, (96, 17)))
    trainer = unisono.Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, batch_size=24, microbatches=8)
    trainer.fit(data, epochs=3)
