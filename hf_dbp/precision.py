"""Whether products of 16 bits are fast.

On a CPU, torch multiplies matrices of 16 bits fast only with AVX-512 (through oneDNN). Without it, as on most desktops
and laptops, it computes them element by element: 25 times as slow as in float32 with torch 2.13 on an AVX2 processor.
"""

from __future__ import annotations

import torch

__all__ = ["fast_in_16_bits"]


def fast_in_16_bits(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 about as fast as those of float32, or faster."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
