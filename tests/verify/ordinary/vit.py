"""A vision transformer from transformers."""

import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import unisono


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images).logits, labels, reduction="sum"), len(labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    data = torch.utils.data.TensorDataset(torch.randn(80, 3, 16, 16), torch.arange(80) % 5)
    trainer = unisono.Trainer(model, torch.optim.NAdam(model.parameters(), lr=1e-3), loss, batch_size=16, microbatches=4)
    trainer.fit(data, epochs=3)
