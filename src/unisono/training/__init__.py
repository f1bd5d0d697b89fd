"""Training: the trainer, and the parts of a step."""
