"""`python -m unisono` is the `unisono` command."""

from __future__ import annotations

from unisono.launch.cli import main

main()
