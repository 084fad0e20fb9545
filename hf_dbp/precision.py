"""Whether products of 16 bits are fast.

On a CPU, torch multiplies matrices of 16 bits fast only where oneDNN does, for bfloat16 with AVX-512 or on some ARM
processors. Elsewhere, as on most desktops and laptops, it computes them element by element: 8 to 36 times as slow as in
float32, by the operation, with torch 2.13 on an AVX2 processor.
"""

from __future__ import annotations

import torch

__all__ = ["fast_in_16_bits"]


def fast_in_16_bits(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a device multiplies matrices of a 16-bit type about as fast as those of float32, or faster."""
    return device.type != "cpu" or cpu_is_fast(dtype)


def cpu_is_fast(dtype: torch.dtype) -> bool:
    """`fast_in_16_bits` of the CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    native = torch.ops.mkldnn
    return bool(native._is_mkldnn_fp16_supported() if dtype == torch.float16 else native._is_mkldnn_bf16_supported())
