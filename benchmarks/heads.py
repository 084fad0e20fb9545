r"""UperNet and EoMT on the same encoder, images and crops: mean IoU, parameters, and step time measured in turns.

    python benchmarks/rare_classes.py prepare --camvid FOLDER --output_dir DATA
    python benchmarks/heads.py run --data_dir DATA --encoders ENCODERS --results RESULTS --steps 300 --seeds 1
    python benchmarks/heads.py report RESULTS --report_dir docs/results/heads

`run` fine-tunes each head at each learning rate of `RATES` with seed 0, then with the other seeds at its best one,
and leaves out what has its JSON file already; then it times training steps of both heads on one batch, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from short_runs import CROPS, ENCODERS, NAMES, data_flags, fine_tuned, machine, shown, write_whole

from hf_dbp.comparison.statistics import mean_interval
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.segmentation.arguments import HEADS, ModelArguments
from hf_dbp.downstream.segmentation.data import SegmentationSource, TrainingCrops, load_labelled_images
from hf_dbp.downstream.segmentation.heads import build_head, training_loss
from hf_dbp.downstream.segmentation.transforms import Augmentation

DATA = "camvid"
RATES = ("1e-3", "2.5e-4", "6e-5")
#: UperNet as in `short_runs`; EoMT has none of its widths, so they are set back to their defaults
HEAD_FLAGS = {"upernet": [], "eomt": ["--head", "eomt", "--head_size", "512", "--auxiliary_head_size", "256"]}
SMALL = {"upernet": {"head_size": 64, "auxiliary_head_size": 32}, "eomt": {}}
TURNS = 15
KEPT = ("mean_iou", "per_class", "seed", "train_seconds", "data", "arguments", "versions", "hardware")


def run(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Train and evaluate what is missing, then time the steps."""
    results = Path(args.results)
    for head in HEAD_FLAGS:
        for rate in RATES:
            trained(args, head, rate, 0, more)
        for seed in range(1, args.seeds):
            trained(args, head, best_rate(read(results), head), seed, more)
    if not (results / "time.json").is_file():
        write_whole(results / "time.json", step_times(args))


def trained(args: argparse.Namespace, head: str, rate: str, seed: int, more: Sequence[str]) -> None:
    """Train and evaluate a head, unless its figures are there."""
    file = Path(args.results) / f"{head}-{rate}-{seed}.json"
    if file.is_file():
        return
    own = [*data_flags(DATA, args.data_dir, args.encoders), "--max_steps", str(args.steps)]
    own += ["--crop_size", str(args.crop_size), "--per_device_train_batch_size", str(args.batch)]
    record = fine_tuned(DATA, [*own, *HEAD_FLAGS[head], "--learning_rate", rate, "--seed", str(seed), *more])
    write_whole(file, {key: record[key] for key in KEPT})


Runs = dict[tuple[str, str, int], dict[str, Any]]  # the record of each head, learning rate and seed


def read(results: Path) -> Runs:
    """The finished runs."""
    found = {}
    for file in sorted(results.glob("*-*.json")):
        head, rest = file.stem.split("-", 1)
        rate, seed = rest.rsplit("-", 1)
        found[head, rate, int(seed)] = json.loads(file.read_text(encoding="utf-8"))
    return found


def best_rate(runs: Runs, head: str) -> str:
    """The learning rate with the highest mean IoU of seed 0."""
    return max(RATES, key=lambda rate: float(runs[head, rate, 0]["mean_iou"]))


def step_times(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each training step of each head on the same crops, in turns after one turn to warm up; parameters."""
    folder, crop = Path(args.data_dir), args.crop_size
    source = SegmentationSource(
        train_dir=str(folder / DATA),
        id2label=str(folder / f"{DATA}.json"),
        ignore_index=11,
        max_train_samples=args.batch,
    )
    names = dict(enumerate(NAMES[DATA]))
    images, _ = load_labelled_images(source)
    crops = TrainingCrops(images, Augmentation(crop, None, 11), mean=[0.5] * 3, std=[0.25] * 3, seed=0)
    samples = [crops[0, index] for index in range(args.batch)]
    inputs = {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels")}
    steps, parameters = {}, {}
    for head, widths in SMALL.items():
        flags = ModelArguments(model_size="mini", head=head, **widths)
        vit = load_vit(str(Path(args.encoders) / ENCODERS[DATA]))
        model = build_head(vit, names, flags, crop_size=crop, ignore_index=11).train()
        parameters[head] = sum(parameter.numel() for parameter in model.parameters())
        steps[head] = (model, training_loss(model, None), torch.optim.AdamW(model.parameters(), lr=1e-4))
    seconds: dict[str, list[float]] = {head: [] for head in steps}
    for turn in range(TURNS + 1):
        for head, (model, loss, optimizer) in steps.items():
            began = time.perf_counter()
            share = torch.ones_like(loss.labelled(inputs["labels"]), dtype=torch.float32)
            loss(model, inputs, share, turn / TURNS)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[head].append(time.perf_counter() - began)
    measured = {head: found[1:] for head, found in seconds.items()}
    return {"seconds": measured, "parameters": parameters, "batch": args.batch, "crop": crop}


def report(args: argparse.Namespace) -> None:
    """Write README.md and runs.json."""
    runs = read(Path(args.results))
    timing = json.loads((Path(args.results) / "time.json").read_text(encoding="utf-8"))
    best = {head: best_rate(runs, head) for head in HEAD_FLAGS}
    seeds = sorted(set.intersection(*({s for h, r, s in runs if (h, r) == one} for one in best.items())))
    scores = {head: [float(runs[head, rate, seed]["mean_iou"]) for seed in seeds] for head, rate in best.items()}
    difference = mean_interval(
        [eomt - upernet for eomt, upernet in zip(scores["eomt"], scores["upernet"], strict=True)]
    )
    folder = Path(args.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(runs.values()))
    search = [f"| {HEADS[h]} | {r} | {runs[h, r, 0]['mean_iou']:.3f} |" for h in HEAD_FLAGS for r in RATES]
    rows = [f"| {HEADS[head]} | {best[head]} | {shown(mean_interval(found))} |" for head, found in scores.items()]
    pairs = zip(timing["seconds"]["upernet"], timing["seconds"]["eomt"], strict=True)
    ratios = sorted(eomt / upernet for upernet, eomt in pairs)
    speed = [
        f"| {HEADS[head]} | {timing['parameters'][head]:,} | {statistics.median(found):.3f} |"
        for head, found in timing["seconds"].items()
    ]
    arguments, data = first["arguments"], first["data"]
    text = f"""# UperNet and EoMT

CamVid, {data["train_images"]} training and {data["validation_images"]} validation images, {arguments["max_steps"]}
steps of {timing["batch"]} crops of {timing["crop"]} pixels, from one pre-trained mini encoder (4 layers of 128, patches
of 8). UperNet has heads of 64 and 32 channels, EoMT its defaults; the layer decay is {arguments["layer_decay"]}.
Seeds: {", ".join(map(str, seeds))}, {"so a first look without intervals" if len(seeds) == 1 else "95 % intervals"}.

| head | learning rate | mean IoU |
| --- | --- | --- |
{chr(10).join(rows)}

EoMT against UperNet, paired by seed: {shown(difference, "+")}. The learning rates were tried with seed 0, which counts
among the seeds above:

| head | learning rate | mean IoU |
| --- | --- | --- |
{chr(10).join(search)}

A training step (forward, backward, AdamW) of {timing["batch"]} crops of {timing["crop"]} pixels, {len(ratios)} of each
head in turns; EoMT takes {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] times as long (median and
range).

| head | parameters | seconds per step (median) |
| --- | --- | --- |
{chr(10).join(speed)}

{machine(first)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "runs.json").write_text(
        json.dumps({"runs": list(runs.values()), "time": timing}, indent=1) + "\n", encoding="utf-8"
    )
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    for name in ("--data_dir", "--encoders", "--results"):
        runs.add_argument(name, required=True)
    runs.add_argument("--steps", type=int, default=300)
    runs.add_argument("--crop_size", type=int, default=CROPS[DATA])
    runs.add_argument("--batch", type=int, default=16)
    runs.add_argument("--seeds", type=int, default=1)
    written = commands.add_parser("report")
    written.add_argument("results")
    written.add_argument("--report_dir", required=True)
    args, more = parser.parse_known_args()
    if args.command == "run":
        run(args, more)
    else:
        report(args)


if __name__ == "__main__":
    main()
