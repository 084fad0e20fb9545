"""16 bits: whether products in them are fast, and a warning where weights are trained in them.

On a CPU, torch multiplies matrices of 16 bits fast only where oneDNN does, for bfloat16 with AVX-512 or on some ARM
processors. Elsewhere, as on most desktops and laptops, it computes them element by element: 8 to 36 times as slow as in
float32, by the operation, with torch 2.13 on an AVX2 processor.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

__all__ = ["fast_in_16_bits", "warn_of_16_bit_weights"]

logger = logging.getLogger(__name__)


def fast_in_16_bits(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a device multiplies matrices of a 16-bit type about as fast as those of float32, or faster."""
    return device.type != "cpu" or cpu_is_fast(dtype)


def cpu_is_fast(dtype: torch.dtype) -> bool:
    """`fast_in_16_bits` of the CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    native = torch.ops.mkldnn
    return bool(native._is_mkldnn_fp16_supported() if dtype == torch.float16 else native._is_mkldnn_bf16_supported())


def warn_of_16_bit_weights(model: nn.Module) -> None:
    """Warn if the optimizer's steps are added to weights of 16 bits: bfloat16 keeps eight binary digits, so a step
    below a 512th of a weight changes nothing."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.dtype.itemsize < 4}
    if kinds:
        logger.warning(
            "weights are trained in %s, in which most steps are too small to register: load the model with "
            "dtype=torch.float32, and for speed train it with bf16=True",
            ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
        )
