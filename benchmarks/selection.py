"""Compare images chosen by `hf-dbp select` with random ones, by the mean IoU that retrieval gets from their labels.

    python benchmarks/selection.py --model VIT --dataset_name wire_bonding --output_dir docs/results/selection
    python benchmarks/selection.py --page docs/results/selection

The training images are embedded once. For each method, number of labels and seed, that many images are chosen, their
labels are given to `hf-dbp retrieve` (a fixed encoder, nothing trained), and the same validation images are scored. The
seed is for k-means and the random draw; k-centre has none, so it runs once. The second command makes README.md from all
JSON files in the folder; intervals are of the difference to the mean of the random draws (t).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from hf_dbp.data.images import ImageList
from hf_dbp.downstream.embedding import embed_images, read_embeddings
from hf_dbp.downstream.features import load_encoder
from hf_dbp.downstream.segmentation import retrieval
from hf_dbp.downstream.segmentation.data import SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels
from hf_dbp.downstream.selection import select_images
from hf_dbp.records import hardware, source_commit, versions, write_json


def cached(patch_tokens):
    """The validation windows go through the encoder once."""
    kept = {}

    def tokens(vit, pixels):
        key = hash(pixels.numpy().tobytes())
        if key not in kept:
            kept[key] = patch_tokens(vit, pixels)
        return kept[key]

    return tokens


def measure(args):
    source = SegmentationSource(
        dataset_name=args.dataset_name, train_dir=args.train_dir, num_labels=args.num_labels,
        built_in_size=args.built_in_size, max_train_samples=args.pool, max_eval_samples=args.validation,
        annotation_column_name=args.annotation_column_name,
    )  # fmt: skip
    train, validation = load_labelled_images(source)
    names = source.class_names()
    images = ImageList(train.samples, train.columns[0], train.num_channels, 0)
    encoder = load_encoder(args.model, images)
    with tempfile.TemporaryDirectory() as folder:
        embed_images(encoder, images, Path(folder) / "table.parquet")
        table = read_embeddings(Path(folder) / "table.parquet")
    train_data, eval_data = (WholeImages(one, args.long_edge, encoder.mean, encoder.std) for one in (train, validation))
    memories = []
    for index in range(len(train_data)):
        alone: Any = torch.utils.data.Subset(train_data, [index])
        alone.images = train
        memories.append(retrieval.build_memory(encoder.vit, alone, args.crop_size, len(names), 10**9))
    retrieval.patch_tokens = cached(retrieval.patch_tokens)
    rows, began = [], time.monotonic()
    for labels in args.labels:
        for method in ("random", "typical", "k_centre"):
            for seed in range(1 if method == "k_centre" else args.seeds):
                chosen = select_images(table, labels, method, seed=seed)
                parts = [memories[int(table.rows[one])] for one in chosen]
                memory, shares = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
                model = retrieval.RetrievalSegmenter(encoder.vit, memory, shares, names)
                counts = count_pixels(
                    model, ([eval_data[i]] for i in range(len(eval_data))), num_labels=len(names),
                    ignore_index=source.ignore_index, crop_size=args.crop_size,
                )  # fmt: skip
                rows.append({"method": method, "labels": labels, "seed": seed,
                             "mean_iou": retrieval.figures(counts.confusion_KK, names)["mean_iou"]})  # fmt: skip
                print(f"{time.monotonic() - began:7.1f} s", rows[-1], flush=True)
    record = {
        "schema": 1, "data": args.name or source.name, "pool": len(train), "validation": len(validation),
        "encoder": args.encoder, "crop_size": args.crop_size, "long_edge": args.long_edge, "rows": rows,
        "near_duplicates": table.record["near_duplicates"], "commit": source_commit(), "versions": versions(),
        "hardware": hardware(),
    }  # fmt: skip
    write_json(Path(args.output_dir) / f"{record['data']}.json", record)


def page(folder):
    lines = [
        "# Which images to label", "",
        "Mean IoU of retrieval (`hf-dbp retrieve`, nothing trained) on the same validation images, from the labels of",
        "the chosen images: mean ± standard deviation over seeds, differences of the means with 95 % intervals.",
        "Made by `benchmarks/selection.py`.",
    ]  # fmt: skip
    for file in sorted(Path(folder).glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        lines += ["", f"## {record['data']}", "",
                  f"{record['pool']} images to choose from ({record['near_duplicates']} near-duplicates left out), "
                  f"{record['validation']} validation images; encoder: {record['encoder']}; windows of "
                  f"{record['crop_size']} pixels, long edge {record['long_edge']}.", "",
                  "| labelled images | random | typical | typical - random | k-centre | k-centre - random |",
                  "| ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for labels in sorted({row["labels"] for row in record["rows"]}):
            lines.append("| " + " | ".join([str(labels), *cells(record["rows"], labels)]) + " |")
    (Path(folder) / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(rows, labels):
    found = {
        method: [row["mean_iou"] for row in rows if (row["method"], row["labels"]) == (method, labels)]
        for method in ("random", "typical", "k_centre")
    }
    random, typical, centre = found["random"], found["typical"], found["k_centre"][0]

    def shown(values):
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} ({len(values)} seeds)"

    welch = stats.ttest_ind(typical, random, equal_var=False).confidence_interval()
    one = stats.ttest_1samp([centre - value for value in random], 0).confidence_interval()
    return [
        shown(random), shown(typical),
        f"{statistics.mean(typical) - statistics.mean(random):+.3f} [{welch.low:+.3f}, {welch.high:+.3f}]",
        f"{centre:.3f}", f"{centre - statistics.mean(random):+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
    ]  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--page", help="only make README.md from the results in this folder")
    parser.add_argument("--model", help="stock ViT")
    parser.add_argument("--encoder", default="", help="how it was pre-trained, for the page")
    parser.add_argument("--dataset_name")
    parser.add_argument("--train_dir")
    parser.add_argument("--name", help="of the data, for the page")
    parser.add_argument("--num_labels", type=int)
    parser.add_argument("--annotation_column_name")
    parser.add_argument("--built_in_size", type=int, default=96)
    parser.add_argument("--pool", type=int, default=400, help="images to choose from")
    parser.add_argument("--validation", type=int, default=50)
    parser.add_argument("--crop_size", type=int, default=64)
    parser.add_argument("--long_edge", type=int, default=96)
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 40, 80])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", default="docs/results/selection")
    args = parser.parse_args(arguments)
    if args.page is None:
        measure(args)
    page(args.page or args.output_dir)


if __name__ == "__main__":
    main()
