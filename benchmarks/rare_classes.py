r"""Do crops around rare classes, Dice and class weights pay off? Paired fine-tuning runs, with each alone and together.

    python benchmarks/rare_classes.py prepare --camvid FOLDER --output_dir DATA
    python benchmarks/rare_classes.py jobs --data_dir DATA --encoders ENCODERS --results RESULTS > jobs.txt
    sh jobs.txt                       # or several lines at a time: each is one run, which writes one JSON file
    python benchmarks/rare_classes.py report RESULTS --report_dir docs/results/rare_classes

Every variant trains the same small UperNet from the same pre-trained encoder, on the same images, for the same steps,
once per seed; only the flags of `VARIANTS` differ. The report holds mean IoU and the IoU, recall and precision of the
rare classes, and for each variant against plain cross-entropy the paired difference with its 95 % interval. Seeds that
some variant lacks are left out and named.

FOLDER holds CamVid as parquet files of images and masks (11 classes, 11 is void); ENCODERS holds the folders
`camvid-fused` and `wire-fused`, ViTs as `hf-dbp fuse` writes them. `prepare` re-encodes CamVid's photographs (JPEG 65)
and renders `wire_bonding`, so that 18 MB hold all of it.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tifffile
from matplotlib.figure import Figure
from PIL import Image
from short_runs import NAMES, add_job_flags, data_flags, fine_tuned, job, machine, shown, write_whole

from hf_dbp.comparison.statistics import Mean, mean_interval, paired_test
from hf_dbp.data.wire_bonding import WireBonding

VARIANTS = {
    "cross-entropy": [],
    "rare crops": ["--rare_crops", "0.33"],
    "Dice": ["--loss", "ce+dice"],
    "weights": ["--class_weights", "sqrt"],
    "all three": ["--rare_crops", "0.33", "--loss", "ce+dice", "--class_weights", "sqrt"],
}
BASELINE = "cross-entropy"
RARE = {"camvid": ["pole", "sign", "pedestrian", "bicyclist"], "wire_bonding": ["ball", "wedge"]}
STEPS = "400"
KEPT = ("mean_iou", "per_class", "seed", "train_seconds", "data", "arguments", "versions", "hardware")


# ---- data ----


def prepare(args: argparse.Namespace) -> None:
    """Write DATA/camvid and DATA/wire_bonding: parquet files with images and masks, and the names of the classes."""
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    for data, rows in (("camvid", _camvid), ("wire_bonding", _wire_bonding)):
        folder = Path(args.output_dir) / data
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            samples = [
                {"image": {"bytes": image, "path": None}, "annotation": {"bytes": mask, "path": None}}
                for image, mask in rows(args, split)
            ]
            table = datasets.Dataset.from_list(samples, features=features)
            table.to_parquet(str(folder / f"{split}.parquet"))
            print(f"{folder}: {len(samples)} {split} images")
        (Path(args.output_dir) / f"{data}.json").write_text(json.dumps(NAMES[data]) + "\n", encoding="utf-8")


def _camvid(args: argparse.Namespace, split: str) -> Iterator[tuple[bytes, bytes]]:
    files = sorted(str(path) for path in Path(args.camvid).glob(f"{split}-*.parquet"))
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    for row in table.cast_column("annotation", datasets.Image(decode=False)):
        stored = io.BytesIO()
        row["image"].save(stored, "JPEG", quality=65)
        yield stored.getvalue(), row["annotation"]["bytes"]


def _wire_bonding(args: argparse.Namespace, split: str) -> Iterator[tuple[bytes, bytes]]:
    count, first = (200, 0) if split == "train" else (60, 10_000_000)
    source = WireBonding(count, size=96, seed=0, first=first)
    for sample in map(source.__getitem__, range(count)):
        image, mask = io.BytesIO(), io.BytesIO()
        tifffile.imwrite(image, sample["image"], compression="zlib", photometric="minisblack", planarconfig="contig")
        Image.fromarray(sample["annotation"].astype(np.uint8)).save(mask, "PNG")
        yield image.getvalue(), mask.getvalue()


# ---- runs ----


def jobs(args: argparse.Namespace) -> None:
    """Print a command per run, seed after seed, so that a list that is cut short holds whole seeds."""
    for seed in range(args.seeds):
        for data in NAMES:
            for variant in VARIANTS:
                file = Path(args.results) / data / f"{variant.replace(' ', '_')}-{seed}.json"
                words = ["--data", data, "--variant", variant, "--seed", str(seed), "--output", str(file)]
                print(job(args, words))


def run(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Train and evaluate one variant with one seed and write its figures, unless they are there."""
    if Path(args.output).is_file():
        return
    flags = [*data_flags(args.data, args.data_dir, args.encoders), "--max_steps", STEPS, *VARIANTS[args.variant]]
    record = fine_tuned(args.data, [*flags, "--seed", str(args.seed), *more])
    kept = {key: record[key] for key in KEPT} | {"benchmark": {"data": args.data, "variant": args.variant}}
    write_whole(Path(args.output), kept)


# ---- report ----

Found = dict[str, list[dict[str, Any]]]  # the records of each variant, seed after seed


def read(folder: Path) -> tuple[dict[str, Found], list[str]]:
    """The records of the seeds that all variants have, by data set, and what is left out."""
    records: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        benchmark = record["benchmark"]
        records.setdefault(benchmark["data"], {}).setdefault(benchmark["variant"], {})[record["seed"]] = record
    sets, left_out = {}, []
    for data, runs in records.items():
        seeds = set.intersection(*(set(runs.get(variant, {})) for variant in VARIANTS))
        left_out += [
            f"{data}, {variant}, seed {seed}" for variant, found in runs.items() for seed in sorted(set(found) - seeds)
        ]
        if seeds:
            sets[data] = {variant: [runs[variant][seed] for seed in sorted(seeds)] for variant in VARIANTS}
    return sets, left_out


def figure(record: dict[str, Any], name: str, key: str = "iou") -> float:
    """A figure of a class, or the mean IoU of all or of the rare classes; undefined values count as 0."""
    if name == "all":
        return float(record["mean_iou"])
    names = RARE[record["benchmark"]["data"]] if name == "rare" else [name]
    return float(np.mean([record["per_class"][each][key] or 0.0 for each in names]))


def difference(found: Found, variant: str, name: str, key: str = "iou") -> Mean:
    """The paired difference of a variant to plain cross-entropy."""
    base, values = ([figure(record, name, key) for record in found[each]] for each in (BASELINE, variant))
    return paired_test(base, values).difference


def section(data: str, found: Found) -> list[str]:
    """Tables of one data set."""
    first = found[BASELINE][0]
    rare, arguments = RARE[data], first["arguments"]
    share = sum(first["per_class"][name]["pixels"] for name in rare) / first["data"]["validation_pixels"]
    lines = [
        f"## {data}",
        "",
        f"{first['data']['train_images']} training and {first['data']['validation_images']} validation images, "
        f"{arguments['max_steps']} steps of {arguments['per_device_train_batch_size']} crops of "
        f"{arguments['crop_size']} pixels, {len(found[BASELINE])} paired seed(s), from a pre-trained encoder. Rare: "
        f"{', '.join(rare)}, together {share:.2%} of the labelled validation pixels.",
        "",
        *(["**One seed: no interval, so no proof; a first look.**", ""] if len(found[BASELINE]) == 1 else []),
        "Mean over the seeds, and the difference to plain cross-entropy of the same seed with its 95 % interval:",
        "",
        "| variant | mean IoU | difference | IoU of the rare classes | difference | their recall | their precision |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    if not any(figure(record, "rare") for runs in found.values() for record in runs):
        lines[-4:-4] = ["**No variant finds a rare class: runs as short as these do not compare them.**", ""]
    for variant, runs in found.items():
        row = [variant]
        for name in ("all", "rare"):
            row.append(f"{np.mean([figure(record, name) for record in runs]):.3f}")
            row.append("" if variant == BASELINE else shown(difference(found, variant, name), "+"))
        row += [f"{np.mean([figure(record, 'rare', key) for record in runs]):.3f}" for key in ("recall", "precision")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "IoU by class, mean over the seeds:", "", "| variant | " + " | ".join(first["per_class"]) + " |"]
    lines.append("| --- |" + " ---: |" * len(first["per_class"]))
    for variant, runs in found.items():
        means = (mean_interval([figure(record, name) for record in runs]).mean for name in first["per_class"])
        lines.append(f"| {variant} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines += ["", "Difference of the IoU of each rare class to plain cross-entropy:", ""]
    lines += ["| variant | " + " | ".join(rare) + " |", "| --- |" + " ---: |" * len(rare)]
    for variant in list(found)[1:]:
        lines.append(f"| {variant} | " + " | ".join(shown(difference(found, variant, n), "+") for n in rare) + " |")
    return [*lines, ""]


def plot(sets: dict[str, Found], path: Path) -> None:
    """The paired differences of each class's IoU with their intervals, a row of pictures per data set."""
    drawn = Figure(figsize=(11, 3.2 * len(sets)), layout="constrained")
    for axis, (data, found) in zip(drawn.subplots(len(sets), 1, squeeze=False)[:, 0], sets.items(), strict=True):
        names = ["all", "rare", *found[BASELINE][0]["per_class"]]
        for number, variant in enumerate(list(found)[1:]):
            means = [difference(found, variant, name) for name in names]
            places = np.arange(len(names)) + (number - 1.5) * 0.18
            errors = [0.0 if mean.high is None else mean.high - mean.mean for mean in means]
            axis.errorbar(places, [mean.mean for mean in means], errors, fmt="o", markersize=4, label=variant)
        axis.axhline(0, color="grey", linewidth=0.8)
        labels = ["mean of all", "mean of rare", *(f"{n} (rare)" if n in RARE[data] else n for n in names[2:])]
        axis.set_xticks(range(len(names)), labels, rotation=25, ha="right")
        axis.set_ylabel("difference of IoU")
        axis.set_title(f"{data}, {len(found[BASELINE])} paired seed(s), against plain cross-entropy")
        axis.legend(fontsize="small")
    drawn.savefig(path, dpi=100)


def report(args: argparse.Namespace) -> None:
    """Write README.md, its picture and the figures of all runs."""
    sets, left_out = read(Path(args.results))
    if not sets:
        raise SystemExit(f"{args.results}: no seed has been run with every variant; finish the jobs of one first")
    folder = Path(args.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Rare classes",
        "",
        "What crops drawn around rare classes (`--rare_crops 0.33`), soft Dice (`--loss ce+dice`) and class weights",
        "(`--class_weights sqrt`) do for classes that hold few pixels. Written by `benchmarks/rare_classes.py`; the",
        "figures of every run are in `runs.json`. Short runs of a small model: what counts are the differences.",
        "",
        "![Differences of IoU to plain cross-entropy](differences.png)",
        "",
    ]
    for data, found in sets.items():
        lines += section(data, found)
    if left_out:
        lines += [f"Left out, because some variant lacks the seed: {'; '.join(left_out)}.", ""]
    record = next(iter(sets.values()))[BASELINE][0]
    lines += [machine(record)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(sets, folder / "differences.png")
    kept = ("mean_iou", "per_class", "seed", "train_seconds")
    runs = {
        data: {variant: [{key: run[key] for key in kept} for run in runs] for variant, runs in found.items()}
        for data, found in sets.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write the data sets")
    command.add_argument("--camvid", required=True, help="folder of CamVid's parquet files")
    command.add_argument("--output_dir", required=True)
    command = commands.add_parser("jobs", help="print a command per run")
    add_job_flags(command, "benchmarks/rare_classes.py")
    command = commands.add_parser("run", help="one variant with one seed; further flags go to hf-dbp finetune")
    command.add_argument("--data", choices=NAMES, required=True)
    command.add_argument("--variant", choices=VARIANTS, required=True)
    command.add_argument("--seed", type=int, required=True)
    command.add_argument("--data_dir", required=True)
    command.add_argument("--encoders", required=True)
    command.add_argument("--output", required=True, help="JSON file of its figures")
    command = commands.add_parser("report", help="assemble the runs")
    command.add_argument("results")
    command.add_argument("--report_dir", required=True)
    args, more = parser.parse_known_args(arguments)
    if more and args.command != "run":
        parser.error(f"unknown: {' '.join(more)}")
    if args.command == "run":
        run(args, more)
    else:
        {"prepare": prepare, "jobs": jobs, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
