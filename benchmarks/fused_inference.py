"""The cost of inference with a fused ViT, compared with a stock ViT of the same shape, alternating in one run.

    python benchmarks/fused_inference.py [--model_size small] [--output fused_inference.json]

Both are evaluated on the same images without gradients; R of every layer is far from I before fusing. The naive form (z
for every token) and the unfused model (A = W R formed in each forward pass) are measured too. Figures are medians, over
the repeats, of each model's time divided by the stock model's in the same repeat. On a CPU it is processor time, which
excludes other programs; on a GPU it is wall-clock time.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from hf_dbp import SIZES, DBPViTMAEConfig, DBPViTMAEForPreTraining, decorrelated_layers, extract_vit


def models(size: str) -> dict[str, torch.nn.Module]:
    """A fused ViT, a stock one with other weights, and the encoder before fusing, fused on the fly and naive."""
    torch.manual_seed(0)
    shape = SIZES[size]
    found: dict[str, torch.nn.Module] = {}
    for name, naive in (("unfused", False), ("naive", True)):
        mae = DBPViTMAEForPreTraining(DBPViTMAEConfig(**shape, mask_ratio=0.0, naive_decorrelation=naive)).eval()
        with torch.no_grad():
            for _, layer in decorrelated_layers(mae):
                layer.decorrelation.R.add_(torch.randn_like(layer.decorrelation.R) * 0.01)
        found[name] = mae.vit
        if not naive:
            found["fused"] = extract_vit(mae)
    fields = {key: value for key, value in shape.items() if "decoder" not in key}
    found["stock"] = ViTModel(ViTConfig(**fields), add_pooling_layer=False).eval()
    return found


@torch.inference_mode()
def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward."""
    on_gpu = images.is_cuda
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    model(images)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(size: str, batch: int, repeats: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates = {name: model.to(device) for name, model in models(size).items()}
    images = torch.randn(batch, 3, 224, 224, device=device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name in sorted(candidates, reverse=repeat % 2 == 1):  # the first in one repeat is the last in the next
            times[name].append(seconds(candidates[name], images))
    times = {name: values[1:] for name, values in times.items()}  # without the warm-up
    ratios = {
        name: sorted(value / stock for value, stock in zip(values, times["stock"], strict=True))
        for name, values in times.items()
    }
    quarter = repeats // 4
    return {
        "model_size": size,
        "batch": batch,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "stock_seconds": statistics.median(times["stock"]),
        "ratio_to_stock": {name: statistics.median(values) for name, values in ratios.items()},
        "middle_half": {name: [values[quarter], values[-1 - quarter]] for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of inference with a fused ViT compared with a stock one.")
    parser.add_argument("--model_size", default="small", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = measure(args.model_size, args.batch, args.repeats)
    print(f"{'model':<10} {'ratio to stock':>15} {'middle half':>17}")
    for name, ratio in result["ratio_to_stock"].items():
        low, high = result["middle_half"][name]
        print(f"{name:<10} {ratio:>15.3f} {low:>8.3f} .. {high:.3f}")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
