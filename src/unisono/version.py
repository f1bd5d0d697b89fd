"""The version of unisono."""

__version__ = "0.1.0"
