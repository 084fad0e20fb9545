r"""Does it pay to choose the images to label, and when does retrieval do as well as fine-tuning? Paired short runs.

    python benchmarks/selection.py prepare --data_dir DATA --encoders ENCODERS --output CHOICES.json
    python benchmarks/selection.py jobs --data_dir DATA --encoders ENCODERS --choices CHOICES.json --results RESULTS \
        --judges upernet retrieval > jobs.txt
    sh jobs.txt                       # or several lines at a time: each is one run, which writes one JSON file
    python benchmarks/selection.py report RESULTS --report_dir docs/results/selection

DATA and ENCODERS are those of `rare_classes.py` (its `prepare` writes DATA). `prepare` embeds the training images with
the encoder, as `hf-dbp embed` does, and chooses 20, 40 and 80 of them with `hf-dbp select`'s methods ``typical`` and
``k_centre``, and 1, 5, 20, 40 and 80 at random among all of them, near-copies too, as someone without the table would;
the random choices of one seed lie in one another. The seed is that of the draw, of k-means and of training; k-centre
has none, so its images are the same for every seed.

Each run sees only the labels of the chosen images and is judged by the mean IoU on the same whole validation images:

- ``upernet``: the small UperNet, fine-tuned from the encoder for 300 steps of 16 crops; the chosen images are repeated
  so that an epoch has 400 for any number of labels, and each of these draws a crop of its own;
- ``retrieval``: `hf-dbp retrieve` with the same encoder, nothing trained.

The report holds, for each judge, the paired differences of each choice to the random one, and those of retrieval to
UperNet on the random choices, with 95 % intervals, over the seeds that both sides have; it says how many these are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from short_runs import ENCODERS, NAMES, add_job_flags, data_flags, fine_tuned, job, machine, shown, write_whole

from hf_dbp.comparison.statistics import Mean, mean_interval, paired_test
from hf_dbp.data.images import ImageSource
from hf_dbp.data.one_split import open_images
from hf_dbp.downstream.embedding import embed_images, read_embeddings
from hf_dbp.downstream.features import load_encoder
from hf_dbp.downstream.segmentation import retrieval
from hf_dbp.downstream.selection import select_images

CHOSEN = (20, 40, 80)  # labelled images that select chooses
FEW = (1, 5)  # and those of random draws alone
EPOCH = 400  # images of an epoch, repeated from the labelled ones: the same for any number of labels
STEPS = "300"
JUDGES = ("upernet", "retrieval")
METHODS = ("random", "typical", "k_centre")
LONG_EDGE = {"camvid": "240", "wire_bonding": "0"}  # of retrieval: near the scale that the encoder was trained at
Case = tuple[str, int]  # method, labels
CASES: list[Case] = [("random", labels) for labels in FEW] + [(m, labels) for labels in CHOSEN for m in METHODS]


# ---- choices ----


def prepare(args: argparse.Namespace) -> None:
    """Choose the images to label, by their numbers in the training images, for every case and seed."""
    found = {}
    for data in NAMES:
        source = ImageSource(train_dir=str(Path(args.data_dir) / data))
        images = open_images(source, "train")
        encoder = load_encoder(str(Path(args.encoders) / ENCODERS[data]), images)
        with tempfile.TemporaryDirectory() as folder:
            record = embed_images(encoder, images, Path(folder) / "table.parquet")
            table = read_embeddings(Path(folder) / "table.parquet")
        rows: dict[str, list[int]] = {}
        for seed in range(args.seeds):
            order = np.random.default_rng(seed).permutation(table.rows)
            for method, labels in CASES:
                chosen = (
                    order[:labels]
                    if method == "random"
                    else table.rows[select_images(table, labels, method, seed=seed)]
                )
                rows[f"{method}-{labels}-{seed}"] = [int(row) for row in chosen]
        found[data] = {"pool": len(images), "near_duplicates": record["near_duplicates"], "rows": rows}
        print(f"{data}: {len(images)} images, {record['near_duplicates']} of them near-copies, {len(rows)} choices")
    write_whole(Path(args.output), found)


# ---- runs ----


def cases(seeds: int, judges: Sequence[str]) -> Iterator[tuple[str, str, Case, int]]:
    """Data, judge, case and seed of every run; retrieval gives the same for the same images, so k-centre runs once."""
    for seed in range(seeds):
        for data in NAMES:
            for judge in judges:
                for case in CASES:
                    if seed == 0 or (judge, case[0]) != ("retrieval", "k_centre"):
                        yield data, judge, case, seed


def jobs(args: argparse.Namespace) -> None:
    """Print a command per run, seed after seed, so that a list that is cut short holds whole seeds."""
    for data, judge, (method, labels), seed in cases(args.seeds, args.judges):
        file = Path(args.results) / data / f"{judge}-{method}-{labels}-{seed}.json"
        words = ["--data", data, "--judge", judge, "--method", method, "--labels", str(labels), "--seed", str(seed)]
        print(job(args, [*words, "--choices", args.choices, "--output", str(file)]))


def run(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Judge one choice and write its figures, unless they are there."""
    if Path(args.output).is_file():
        return
    chosen = json.loads(Path(args.choices).read_text(encoding="utf-8"))[args.data]
    rows = chosen["rows"][f"{args.method}-{args.labels}-{args.seed}"]
    source = Path(args.data_dir) / args.data
    with tempfile.TemporaryDirectory() as folder:
        train_dir = Path(folder) / "images"
        train_dir.mkdir()
        repeated = rows * (EPOCH // len(rows) if args.judge == "upernet" else 1)
        pq.write_table(pq.read_table(source / "train.parquet").take(repeated), train_dir / "train.parquet")
        shutil.copy(source / "validation.parquet", train_dir)
        flags = data_flags(args.data, args.data_dir, args.encoders, train_dir)
        flags += ["--cache_dir", str(Path(folder) / "cache"), "--seed", str(args.seed)]
        if args.judge == "upernet":
            record = fine_tuned(args.data, [*flags, "--max_steps", STEPS, *more])
            seconds = record["train_seconds"]
        else:
            flags += ["--long_edge", LONG_EDGE[args.data], "--output_dir", str(Path(folder) / "out")]
            record = retrieval.main([*flags, *more])
            seconds = record["memory"]["seconds"]
    about = {name: getattr(args, name) for name in ("data", "judge", "method", "labels", "seed")}
    about |= {"rows": rows, "pool": chosen["pool"], "near_duplicates": chosen["near_duplicates"]}
    kept = {name: record[name] for name in ("mean_iou", "per_class", "data", "arguments", "versions", "hardware")}
    write_whole(Path(args.output), kept | {"seconds": seconds, "benchmark": about})


# ---- report ----

Runs = dict[tuple[str, Case], dict[int, dict[str, Any]]]  # the records by judge and case, then by seed


def read(folder: Path) -> dict[str, Runs]:
    """The records of each data set; retrieval's single one of k-centre stands for every seed of the random draws."""
    sets: dict[str, Runs] = {}
    for file in sorted(folder.glob("*/*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        about = record["benchmark"]
        runs = sets.setdefault(about["data"], {})
        runs.setdefault((about["judge"], (about["method"], about["labels"])), {})[about["seed"]] = record
    for runs in sets.values():
        for labels in CHOSEN:
            once = runs.get(("retrieval", ("k_centre", labels)), {})
            if 0 in once:
                runs["retrieval", ("k_centre", labels)] = dict.fromkeys(
                    runs.get(("retrieval", ("random", labels)), {}), once[0]
                )
    return sets


def figures(runs: Runs, judge: str, case: Case, seeds: Sequence[int]) -> list[float]:
    """Mean IoU of the seeds."""
    return [float(runs[judge, case][seed]["mean_iou"]) for seed in seeds]


def shared(runs: Runs, sides: Sequence[tuple[str, Case]]) -> list[int]:
    """The seeds that all sides have."""
    return sorted(set.intersection(*(set(runs.get(side, {})) for side in sides)))


def difference(runs: Runs, base: tuple[str, Case], other: tuple[str, Case]) -> Mean | None:
    """The paired difference of mean IoU over the seeds that both have; None if they share none."""
    seeds = shared(runs, [base, other])
    return paired_test(figures(runs, *base, seeds), figures(runs, *other, seeds)).difference if seeds else None


def compared(runs: Runs, base: tuple[str, Case], other: tuple[str, Case]) -> list[str]:
    """Cells: mean of each side over the shared seeds, the difference, what it says, and the number of seeds."""
    found, seeds = difference(runs, base, other), shared(runs, [base, other])
    if found is None:
        return ["", "", "not run", "", "0"]
    verdict = "undecided" if len(seeds) > 1 else "(one seed)"
    if found.low is not None and found.high is not None and (found.low > 0 or found.high < 0):
        verdict = "better" if found.low > 0 else "worse"
    means = [f"{np.mean(figures(runs, *side, seeds)):.3f}" for side in (base, other)]
    return [*means, shown(found, "+"), verdict, str(len(seeds))]


def choice_table(runs: Runs) -> list[str]:
    """Chosen against random images, by both judges."""
    lines = [
        "| labelled images | judged by | chosen by | random | chosen | difference | chosen is | seeds |",
        "| ---: | --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for labels in CHOSEN:
        for judge in JUDGES:
            for method in METHODS[1:]:
                cells = compared(runs, (judge, ("random", labels)), (judge, (method, labels)))
                lines.append("| " + " | ".join([str(labels), judge, method, *cells]) + " |")
    return lines


def judge_table(runs: Runs) -> list[str]:
    """Retrieval against UperNet on the random choices, and what either took."""
    lines = [
        "| labelled images | UperNet | retrieval | difference | retrieval is | seeds | training, s | memory, s |",
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for labels in sorted({labels for method, labels in CASES if method == "random"}):
        sides = [(judge, ("random", labels)) for judge in JUDGES]
        cells = compared(runs, sides[0], sides[1])
        seconds = [[record["seconds"] for record in runs.get(side, {}).values()] for side in sides]
        cells += [f"{np.median(each):.1f}" if each else "" for each in seconds]
        lines.append("| " + " | ".join([str(labels), *cells]) + " |")
    return lines


def section(data: str, runs: Runs) -> list[str]:
    """Tables of one data set."""
    record = next(iter(next(iter(runs.values())).values()))
    about = record["benchmark"]
    lines = [
        f"## {data}",
        "",
        f"{about['pool']} training images to choose from, {about['near_duplicates']} of them near-copies of others; "
        f"{record['data']['validation_images']} validation images.",
        "",
    ]
    for judge in JUDGES:
        found = [each["arguments"] for side, kept in runs.items() if side[0] == judge for each in kept.values()]
        settings = sorted({settings_of(judge, each) for each in found})
        lines += [f"{judge}: {'; '.join(settings) or 'not run'}.", ""]
    return [
        *lines, *remarks(runs), "Mean IoU of chosen against random images:", "", *choice_table(runs), "",
        "Mean IoU of retrieval against UperNet, random images (seconds: median, on the machines below):", "",
        *judge_table(runs), "",
    ]  # fmt: skip


def remarks(runs: Runs) -> list[str]:
    """For each judge, whether it tells the worth of labels: whether more random ones make it better."""
    lines = []
    for judge in JUDGES:
        few, many = ((judge, ("random", labels)) for labels in (min(CHOSEN), max(CHOSEN)))
        found = difference(runs, few, many)
        if found is not None:
            means = f"{judge}: {max(CHOSEN)} random images against {min(CHOSEN)}: {shown(found, '+')}"
            better = found.low is not None and found.low > 0
            blind = "**More labels are not shown to help this judge, so it can hardly tell which images teach more.**"
            lines += [means + ("." if better else f". {blind}"), ""]
    return lines


def settings_of(judge: str, arguments: dict[str, Any]) -> str:
    scale = f"long edge {arguments['long_edge'] or 'native'}"
    if judge == "retrieval":
        return f"{arguments['neighbours']} neighbours, windows of {arguments['crop_size']} pixels, {scale}"
    batch = arguments["per_device_train_batch_size"]
    return f"{arguments['max_steps']} steps of {batch} crops of {arguments['crop_size']} pixels, {scale}"


def plot(sets: dict[str, Runs], path: Path) -> None:
    """Mean IoU over the number of labelled images, a picture per data set."""
    drawn = Figure(figsize=(5.5 * len(sets), 4), layout="constrained")
    for axis, (data, runs) in zip(drawn.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        for judge, style in zip(JUDGES, ("-", "--"), strict=True):
            for number, method in enumerate(METHODS):
                labels = sorted({n for kind, (name, n) in runs if (kind, name) == (judge, method)})
                means = [
                    mean_interval(figures(runs, judge, (method, n), sorted(runs[judge, (method, n)]))) for n in labels
                ]
                errors = [0.0 if mean.high is None else mean.high - mean.mean for mean in means]
                axis.errorbar(
                    labels, [mean.mean for mean in means], errors, fmt=f"o{style}", markersize=4, capsize=2,
                    color=f"C{number}", label=f"{judge}, {method}",
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([*FEW, *CHOSEN], [str(n) for n in (*FEW, *CHOSEN)])
        axis.set_xlabel("labelled images")
        axis.set_ylabel("mean IoU")
        axis.set_title(data)
        axis.legend(fontsize="x-small")
    drawn.savefig(path, dpi=100)


def report(args: argparse.Namespace) -> None:
    """Write README.md, its picture and the figures of all runs."""
    sets = read(Path(args.results))
    if not sets:
        raise SystemExit(f"{args.results}: no run is there; finish some jobs first")
    folder = Path(args.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Which images to label, and labels without training",
        "",
        "Images chosen by `hf-dbp select` against random ones, judged by a fine-tuned UperNet and by retrieval",
        "(`hf-dbp retrieve`), and retrieval against UperNet. Means over seeds; paired differences with 95 % intervals;",
        "better or worse only where the interval excludes 0, which one in twenty does by chance. Written by",
        "`benchmarks/selection.py`, which says how; the figures of every run are in `runs.json`. Short runs of a small",
        "model: what counts are the differences.",
        "",
        "![Mean IoU by the number of labelled images](curves.png)",
        "",
    ]
    for data, runs in sets.items():
        lines += section(data, runs)
    records = [record for runs in sets.values() for kept in runs.values() for record in kept.values()]
    lines += sorted({machine(record) for record in records})
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(sets, folder / "curves.png")
    kept = [record["benchmark"] | {"mean_iou": record["mean_iou"], "seconds": record["seconds"]} for record in records]
    (folder / "runs.json").write_text(
        json.dumps(kept, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="choose the images of every case and seed")
    command.add_argument("--data_dir", required=True)
    command.add_argument("--encoders", required=True)
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--output", required=True, help="JSON file of the choices")
    command = commands.add_parser("jobs", help="print a command per run")
    command.add_argument("--choices", required=True)
    command.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    add_job_flags(command, "benchmarks/selection.py")
    command = commands.add_parser("run", help="judge one choice; further flags go to hf-dbp finetune or retrieve")
    command.add_argument("--data", choices=NAMES, required=True)
    command.add_argument("--judge", choices=JUDGES, required=True)
    command.add_argument("--method", choices=METHODS, required=True)
    command.add_argument("--labels", type=int, required=True)
    command.add_argument("--seed", type=int, required=True)
    command.add_argument("--data_dir", required=True)
    command.add_argument("--encoders", required=True)
    command.add_argument("--choices", required=True)
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
