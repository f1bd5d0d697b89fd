"""A variational autoencoder, which draws noise in forward, in bfloat16."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 40))

    def forward(self, inputs):
        mean, spread = self.encoder(inputs).chunk(2, dim=1)
        return self.decoder(mean + torch.randn_like(mean) * (spread / 2).exp()), mean, spread


def loss(model, batch):
    (inputs,) = batch
    output, mean, spread = model(inputs)
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum()
    return F.mse_loss(output.float(), inputs, reduction="sum") + divergence, len(inputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=32, microbatches=4, precision="bf16")
    trainer.fit(TensorDataset(torch.randn(160, 40)), epochs=3)
