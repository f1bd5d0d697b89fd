"""What a run leaves behind: tensors and JSON in a run directory, complete or absent, never pickled."""
