"""How the cost of decorrelation grows with batch, width and depth: three sweeps, as JSON, a table and a figure.

    python benchmarks/step_growth.py --threads 1 --output_dir step_growth        # about ten minutes on one core

One of the three varies at a time around ViT-Tiny/16 (192 wide, 12 blocks; the widths have 4) at 224 pixels and 32
images. A point is measured as in `step_time.py`: methods take turns, ratios are to plain backprop in the same repeat.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from step_time import measure, table

from hf_dbp.records import hardware

METHODS = ("bp", "naive", "dbp", "dbp_block_inputs", "dbp_fast")
LABELS = {
    "naive": "naive",
    "dbp": "dbp",
    "dbp_block_inputs": "dbp, block inputs",
    "dbp_fast": "dbp, block inputs, every 5 steps",
}
Point = tuple[int, dict[str, int]]  # images per step, and the differences from ViT-Tiny


def width(features: int) -> dict[str, int]:
    """Four blocks of that width, with heads of 64 features and an MLP of four times the width."""
    return {
        "hidden_size": features,
        "intermediate_size": 4 * features,
        "num_attention_heads": features // 64,
        "num_hidden_layers": 4,
    }


SWEEPS: dict[str, dict[int, Point]] = {
    "batch": {batch: (batch, {}) for batch in (8, 32, 128)},
    "width": {features: (32, width(features)) for features in (192, 384, 768)},
    "depth": {blocks: (32, {"num_hidden_layers": blocks}) for blocks in (4, 12, 24)},
}


def sweep(args: argparse.Namespace, points: dict[int, Point]) -> dict[int, list[dict[str, Any]]]:
    """value -> one row for each method."""
    found = {}
    for value, (batch, fields) in points.items():
        args.fields = fields
        found[value] = measure(args, "tiny", batch)
        print(f"{fields or 'ViT-Tiny'}\n{table(found[value])}", flush=True)
    return found


def plot(found: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    """Time and FLOPs of a step as multiples of plain backprop's, a panel for each sweep."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, (name, points) in zip(
        figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
    ):
        for colour, (method, label) in enumerate(LABELS.items()):
            for key, style in (("ratio_to_bp", "o-"), ("flops_to_bp", ":")):
                values = [next(row[key] for row in rows if row["method"] == method) for rows in points.values()]
                axis.plot([*points], values, style, color=f"C{colour}", label=label if style == "o-" else None)
        axis.set(xscale="log", xlabel=name, xticks=[*points], xticklabels=map(str, points))
        axis.minorticks_off()
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("step, x plain backprop\n(dotted: FLOPs)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def markdown(found: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """Ratios of the step times, a row for each point."""
    lines = ["| | bp, s | " + " | ".join(LABELS.values()) + " |", "| --- " * (len(LABELS) + 2) + "|"]
    for name, points in found.items():
        for value, rows in points.items():
            by_method = {row["method"]: row for row in rows}
            ratios = [f"{by_method[method]['ratio_to_bp']:.2f}" for method in LABELS]
            lines.append(f"| {name} {value} | {by_method['bp']['seconds']:.3g} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: under autocast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_dir", type=Path, default=Path("step_growth"))
    parser.set_defaults(methods=METHODS, optimizer="adamw", compile=False, clock="cpu", image_size=224, patch_size=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {name: sweep(args, points) for name, points in SWEEPS.items()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = hardware() | {"torch": torch.__version__, "threads": args.threads, "load": os.getloadavg()}
    (args.output_dir / "growth.json").write_text(json.dumps(record | {"sweeps": found}, indent=1) + "\n")
    plot(found, args.output_dir / "growth.png")
    print(f"\n{markdown(found)}\n\nwritten: {args.output_dir}/growth.json, growth.png")


if __name__ == "__main__":
    main()
