"""From a dataset to this worker's microbatches of each global batch."""
