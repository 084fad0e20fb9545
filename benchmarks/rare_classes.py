r"""Do crops around rare classes, Dice and class weights pay off? Paired fine-tuning runs, with each alone and together.

    python benchmarks/rare_classes.py --data wire_bonding --output_dir outputs/rare_classes
    python benchmarks/rare_classes.py --data wire_bonding FOLDER --id2label NAMES.json --report_dir REPORT

Every variant trains the same small UperNet from the same random weights, on the same images, for the same steps, once
per seed; only the flags of `VARIANTS` differ. A run that has its `eval.json` is not repeated. The report holds mean IoU
and the IoU, recall and precision of the rare classes, and for each variant against plain cross-entropy the paired
difference with its 95 % interval. FOLDER holds parquet files of images and masks, --id2label their class names.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_dbp.comparison.statistics import Mean, mean_interval, paired_test
from hf_dbp.downstream.segmentation import finetuning

VARIANTS = {
    "cross-entropy": [],
    "rare crops": ["--rare_crops", "0.33"],
    "Dice": ["--loss", "ce+dice"],
    "weights": ["--class_weights", "sqrt"],
    "all three": ["--rare_crops", "0.33", "--loss", "ce+dice", "--class_weights", "sqrt"],
}
BASELINE = "cross-entropy"
FLAGS = [
    *("--model_size", "mini", "--patch_size", "8", "--head_size", "32", "--auxiliary_head_size", "16"),
    *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8", "--learning_rate", "2e-3"),
    *("--warmup_steps", "0.05", "--lr_scheduler_type", "cosine", "--eval_strategy", "no", "--save_strategy", "no"),
    *(
        "--do_train",
        "--report_to",
        "none",
        "--disable_tqdm",
        "1",
        "--dataloader_num_workers",
        "0",
        "--logging_steps",
        "50",
    ),
    *("--dataloader_persistent_workers", "false", "--use_cpu"),
]
BUILT_IN = ["--built_in_size", "96", "--long_edge", "0", "--crop_size", "64"]
FOLDER = ["--long_edge", "192", "--crop_size", "64"]


def flags_of(args: argparse.Namespace) -> list[str]:
    """The flags that all runs share."""
    counts = ["--max_train_samples", str(args.train_images), "--max_eval_samples", str(args.eval_images)]
    flags = [*FLAGS, *counts, "--max_steps", str(args.steps)]
    if args.data == "wire_bonding":
        return [*flags, *BUILT_IN, "--dataset_name", args.data]
    return [
        *flags,
        *FOLDER,
        "--train_dir",
        args.data,
        "--id2label",
        args.id2label,
        "--ignore_index",
        str(args.ignore_index),
    ]


def records(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The results of each run of each variant; missing runs are made, seed after seed."""
    name = Path(args.data).name
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant, own in VARIANTS.items():
            folder = Path(args.output_dir) / name / f"{variant.replace(' ', '_')}-{seed}"
            if not (folder / "eval.json").is_file():
                finetuning.main([*flags_of(args), *own, "--seed", str(seed), "--output_dir", str(folder)])
            found[variant].append(json.loads((folder / "eval.json").read_text(encoding="utf-8")))
    return found


def rare_names(record: dict[str, Any]) -> list[str]:
    """Classes below a quarter of an even share of the labelled validation pixels."""
    pixels = {name: row["pixels"] for name, row in record["per_class"].items()}
    return [name for name, count in pixels.items() if 0 < count < sum(pixels.values()) / (4 * len(pixels))]


def figure(record: dict[str, Any], name: str, key: str = "iou") -> float:
    """A figure of a class, or the mean IoU of all or of the rare classes; undefined values count as 0."""
    if name == "all":
        return float(record["mean_iou"])
    names = rare_names(record) if name == "rare" else [name]
    return float(np.mean([record["per_class"][each][key] or 0.0 for each in names]))


def shown(mean: Mean, sign: str = "") -> str:
    interval = "" if mean.low is None else f" [{mean.low:{sign}.3f}, {mean.high:{sign}.3f}]"
    return f"{mean.mean:{sign}.3f}{interval}"


def section(data: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Tables of one data set."""
    first = found[BASELINE][0]
    rare, arguments = rare_names(first), first["arguments"]
    share = sum(first["per_class"][name]["pixels"] for name in rare) / first["data"]["validation_pixels"]
    lines = [
        f"## {data}",
        "",
        f"{first['data']['train_images']} training and {first['data']['validation_images']} validation images, "
        f"{arguments['max_steps']} steps of {arguments['per_device_train_batch_size']} crops of "
        f"{arguments['crop_size']} pixels, {len(found[BASELINE])} paired seed(s), from random weights. Rare: "
        f"{', '.join(rare)}, together {share:.2%} of the labelled pixels.",
        "",
        *(["**One seed: no interval, so no proof; a first look.**", ""] if len(found[BASELINE]) == 1 else []),
        "Mean over the seeds, and the difference to plain cross-entropy of the same seed with its 95 % interval:",
        "",
        "| variant | mean IoU | difference | IoU of the rare classes | difference | their recall | their precision |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, runs in found.items():
        row = [variant]
        for name in ("all", "rare"):
            base = [figure(record, name) for record in found[BASELINE]]
            values = [figure(record, name) for record in runs]
            difference = "" if variant == BASELINE else shown(paired_test(base, values).difference, "+")
            row += [f"{np.mean(values):.3f}", difference]
        row += [f"{np.mean([figure(record, 'rare', key) for record in runs]):.3f}" for key in ("recall", "precision")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "IoU by class, mean over the seeds:", "", "| variant | " + " | ".join(first["per_class"]) + " |"]
    lines.append("| --- |" + " ---: |" * len(first["per_class"]))
    for variant, runs in found.items():
        means = (mean_interval([figure(record, name) for record in runs]).mean for name in first["per_class"])
        lines.append(f"| {variant} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return [*lines, ""]


def report(folder: Path, sets: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write README.md and its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Rare classes",
        "",
        "What crops drawn around rare classes (`--rare_crops 0.33`), soft Dice (`--loss ce+dice`) and class weights",
        "(`--class_weights sqrt`) do for classes that hold few pixels. Written by `benchmarks/rare_classes.py`; the",
        "figures of every run are in `runs.json`. Short runs of a small model from random weights: what counts are the",
        "differences.",
        "",
    ]
    for data, found in sets.items():
        lines += section(data, found)
    record = next(iter(sets.values()))[BASELINE][0]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [f"Machine: {record['hardware']['processor']}; {versions}."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = ("mean_iou", "per_class", "seed", "train_seconds")
    runs = {
        data: {variant: [{key: run[key] for key in kept} for run in runs] for variant, runs in found.items()}
        for data, found in sets.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and, with --report_dir, write the report of all data sets named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", nargs="+", default=["wire_bonding"], help="wire_bonding, or folders of parquet files")
    parser.add_argument("--id2label", help="JSON file of the class names of the folders")
    parser.add_argument("--ignore_index", type=int, default=255, help="id of the folders that is not labelled")
    parser.add_argument("--output_dir", default="outputs/rare_classes", help="where the runs go")
    parser.add_argument("--report_dir", help="where the report goes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train_images", type=int, default=200)
    parser.add_argument("--eval_images", type=int, default=40)
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sets = {Path(data).name: records(argparse.Namespace(**vars(args) | {"data": data})) for data in args.data}
    if args.report_dir is not None:
        report(Path(args.report_dir), sets)


if __name__ == "__main__":
    main()
