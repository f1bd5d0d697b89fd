"""A perceptron with dropout, AdamW, a cosine schedule and clipping."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def accuracy(model, batch):
    inputs, labels = batch
    return (model(inputs).argmax(1) == labels).sum(), len(labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    trainer = unisono.Trainer(
        model, optimizer, loss, batch_size=32, microbatches=8, scheduler=scheduler, max_grad_norm=1.0, run_dir="runs/mlp"
    )
    data = TensorDataset(torch.randn(150, 20), torch.arange(150) % 5)
    trainer.fit(data, epochs=4)
    print(trainer.evaluate(data, {"accuracy": accuracy}))
