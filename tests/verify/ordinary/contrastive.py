"""Two noisy views of each sample are told from all others of the whole batch, at a temperature that is learned."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono


class Contrast(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, one, other):
        near = self.log_scale.exp() * one @ other.T
        return F.cross_entropy(near, torch.arange(len(near)), reduction="sum"), len(near)


def embed(model, batch):
    return tuple(F.normalize(model(batch[0] + 0.2 * torch.randn_like(batch[0]))) for _ in range(2))


def still(model, batch):
    return F.normalize(model(batch[0])), F.normalize(model(1.1 * batch[0]))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, contrast = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 8)), Contrast()
    optimizer = torch.optim.SGD([*model.parameters(), *contrast.parameters()], lr=0.1)
    loss = unisono.WholeBatchLoss(still, contrast)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=32, microbatches=8, max_grad_norm=1.0)
    data = TensorDataset(torch.randn(150, 20))
    trainer.fit(data, epochs=4)
    print(trainer.evaluate(data))
