"""T5 from transformers: encoder and decoder, Adafactor."""

import torch
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import unisono


def loss(model, batch):
    source, target = batch
    logits = model(input_ids=source, labels=target).logits
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"), target.numel()


if __name__ == "__main__":
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    data = torch.utils.data.TensorDataset(torch.randint(1, 80, (80, 12)), torch.randint(1, 80, (80, 7)))
    trainer = unisono.Trainer(model, torch.optim.Adafactor(model.parameters(), lr=1e-2), loss, batch_size=16, microbatches=4)
    trainer.fit(data, epochs=3)
