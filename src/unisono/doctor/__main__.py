"""`python -m unisono.doctor` (and `torchrun ... -m unisono.doctor`) is `unisono doctor`."""

from __future__ import annotations

from unisono.launch.cli import doctor

if __name__ == "__main__":
    doctor(prog_name="python -m unisono.doctor")
