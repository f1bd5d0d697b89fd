"""A transformer encoder over ragged, padded and masked sequences; the loss is summed over tokens."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import unisono


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0))


def collate(samples):
    return pad_sequence(samples, batch_first=True)


def loss(model, tokens):
    real = tokens != 0
    return F.cross_entropy(model(tokens)[real], tokens[real], reduction="sum"), real.sum()


if __name__ == "__main__":
    torch.manual_seed(0)
    data = [torch.randint(1, 50, (3 + 5 * i % 11,)) for i in range(90)]
    model = Net()
    loader = unisono.Loader(collate_fn=collate)
    trainer = unisono.Trainer(
        model, torch.optim.AdamW(model.parameters(), 1e-3), loss, batch_size=20, microbatches=5, loader=loader
    )
    trainer.fit(data, epochs=4)
