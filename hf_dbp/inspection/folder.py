"""What is in a folder, what the tool will do with it, and the recipes to start from: the main of `hf-dbp inspect`.

    hf-dbp inspect IMAGES --masks MASKS

reads every file once and writes, beside what it prints, `contact_sheet.png`, `pretrain.yaml`, with masks
`finetune.yaml`, and for colour masks without a palette file a `palette.yaml` to put the names in. The recipes are
`industrial.yaml` and `industrial_upernet.yaml` with what was found filled in.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_dbp.data.decoding import unturned_masks
from hf_dbp.data.folders import Samples, open_pictures
from hf_dbp.data.labels.formats import label_format
from hf_dbp.data.labels.masks import is_labels, mask_folder
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.masks import BINARY, IGNORE, Palette, check_kinds, grey_code
from hf_dbp.data.pairing import Pairs, UnpairedError, pair_folders
from hf_dbp.data.sources import pick_splits
from hf_dbp.data.subset import split_rows
from hf_dbp.errors import UserError, command
from hf_dbp.inspection.contact_sheet import write_contact_sheet
from hf_dbp.inspection.mask_survey import MaskSurvey, survey_masks, write_palette, written_here
from hf_dbp.inspection.survey import ImageKind, duplicates, file_value, survey_images
from hf_dbp.recipes import read_yaml, recipe_path

__all__ = ["inspect_folder", "main"]

T = TypeVar("T")
OUTLYING = 0.01  # less of the range for 99.8 % of the values is a sign of outliers
THIN = 2  # from this ratio of the sides on, an image made smaller to the view has lost most of its short side
STEPS = 1000  # of fine-tuning, at least
SELDOM = 0.2  # of the masks: a rare class in fewer is sought out by crops
VALIDATION = 0.15  # the share that training sets aside; the default of --train_val_split


@dataclass
class Findings:
    """Lines of the report, things to put right, and flags for the recipes."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pretraining: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] = field(default_factory=dict)


def common(counts: Counter[Any], shown: int = 4) -> str:
    """The commonest entries with their counts, and how many others there are."""
    first = ", ".join(f"{entry} ({count})" for entry, count in counts.most_common(shown))
    return first + (f" and {len(counts) - shown} other kinds" if len(counts) > shown else "")


def pooled(splits: Mapping[str, dict[str, T]]) -> dict[str, T]:
    """All that the splits hold; names outside ``train`` begin with that of their split."""
    return {
        name if split == "train" else f"{split}/{name}": value
        for split, content in splits.items()
        for name, value in content.items()
    }


def training_share(splits: Mapping[str, Mapping[str, Any]]) -> int:
    """How many training will see: ``train``, less what is set aside where there is no ``validation``."""
    count = len(splits["train"])
    return count if splits.get("validation") else count - max(1, round(count * VALIDATION))


def describe_images(samples: Samples, kinds: Mapping[str, ImageKind], found: Findings) -> list[ImageKind]:
    """Counts, sizes, channels, depth, unreadable files and duplicates; returns the kinds of the readable ones."""
    files = [file for sample in samples.values() for file in sample]
    suffixes = Counter(Path(file).suffix.lower() for file in files)
    readable = [kind for kind in kinds.values() if not kind.error]
    if not readable:
        raise UserError(f"none of the {len(samples)} images can be read, e.g. {next(iter(kinds.values())).error}")
    gigabytes = sum(Path(file).stat().st_size for file in files) / 1e9
    found.lines += [
        f"images     {len(samples)} in {len(files)} files: {common(suffixes)}; {gigabytes:.2f} GB",
        f"sizes      {common(Counter(f'{k.size[0]} x {k.size[1]}' for k in readable))} (height x width)",
        f"channels   {common(Counter(f'{k.channels} of {k.dtype}' for k in readable))}",
    ]
    describe_values(readable, found)
    errors = [kind.error for kind in kinds.values() if kind.error]
    if errors:
        found.problems.append(
            f"{len(errors)} of {len(samples)} images cannot be read and will be left out of training, e.g. "
            f"{errors[0]}; repair them or move them away"
        )
    copies = duplicates(files)
    if copies:
        found.problems.append(
            f"{sum(len(group) - 1 for group in copies)} files are copies of others, e.g. {' = '.join(copies[0][:2])}; "
            "a copy in training and validation makes validation look better than it is: leave one of each"
        )
    return readable


def describe_values(readable: Sequence[ImageKind], found: Findings) -> None:
    """The range of each type of values, and what is done with it; see `hf_dbp.data.values`."""
    for stored, count in Counter(kind.stored for kind in readable).most_common(3):
        kinds = [kind for kind in readable if kind.stored == stored]
        low, high = min(kind.low for kind in kinds), max(kind.high for kind in kinds)
        if kinds[0].dtype.startswith("uint"):
            done = f"divided by {np.iinfo(kinds[0].dtype).max}"
        elif low >= 0 and high <= 1:
            done = "taken as they are"
        else:
            done = "this range, measured on the training images, becomes 0 to 1"
        found.lines.append(f"values     {low:g} to {high:g} of {stored} ({count} images): {done}")
        bulk = min(kind.bulk[0] for kind in kinds), max(kind.bulk[1] for kind in kinds)
        if kinds[0].dtype.startswith("float") and bulk[1] - bulk[0] < OUTLYING * (high - low):
            found.problems.append(
                f"values of {stored} reach from {low:g} to {high:g}, but 99.8 % of them lie between {bulk[0]:g} and "
                f"{bulk[1]:g}: outliers, or marks of missing data, that squeeze all else; replace them"
            )


def choose_pretraining(trained: int, readable: Sequence[ImageKind], found: Findings) -> None:
    """Channels, view size, native tiles or not, batch for so many images: what the recipe says and why."""
    pictures = all(kind.picture for kind in readable)
    counts = Counter((1 if k.channels < 3 else 3) if k.picture else k.channels for k in readable)  # without alpha
    channels = counts.most_common(1)[0][0]
    if len(counts) > 1 and counts.keys() <= {1, 3}:
        channels = 3  # grey becomes RGB
    elif len(counts) > 1:
        found.problems.append(
            f"images of {' and '.join(map(str, sorted(counts)))} channels: those of other than {channels} will be "
            "left out; sort them into folders of their own, or pass --num_channels to pretrain"
        )
    if len({kind.dtype for kind in readable}) > 1:
        found.problems.append(
            f"pixel types {common(Counter(kind.dtype for kind in readable))} are mixed; 8 and 16 bits are each scaled "
            "by their full range, float images among them are left out: convert them to one type"
        )
    short = int(np.median([min(kind.size) for kind in readable]))
    patch = 16 if short >= 128 else 8
    size = max(patch, min(512, short // patch * patch))
    native = short >= 2 * size
    found.pretraining = {
        "image_size": size,
        "patch_size": patch,
        "num_channels": channels,
        "native_tiles": native,
        "per_device_train_batch_size": max(1, min(16, trained)),
    }
    statistics = "ImageNet's" if channels == 3 and pictures else "measured once on the training images"
    found.lines += [
        f"views      {'random tiles of ' if native else 'random parts, made smaller to '}{size} x {size} pixels"
        f"{' at native resolution (native_tiles: false for whole images made smaller)' if native else ''}",
        f"input      {channels} channels, mean and standard deviation {statistics}",
    ]


def describe_masks(
    args: argparse.Namespace, pairs: Mapping[str, Pairs], kinds: Mapping[str, ImageKind], found: Findings
) -> Samples:
    """Kind of masks, sizes, class balance, and the flags that follow; returns the masks by image."""
    masks = {name: files[1] for name, files in pooled(pairs).items()}
    survey = survey_masks(masks, coloured=args.palette not in (None, BINARY))
    found.lines += ["", f"masks      {len(masks)}; {len(kinds) - len(masks)} images have none and only pre-train"]
    if survey.errors:
        found.problems.append(
            f"{len(survey.errors)} masks cannot be read and will be left out of fine-tuning with their images, e.g. "
            f"{next(iter(survey.errors.values()))}; repair them or move them away"
        )
    values = ((file_value(images), file_value(files)) for images, files in pooled(pairs).values())
    if warning := unturned_masks(values):
        found.problems.append(warning)
    other = [name for name, size in survey.sizes.items() if not kinds[name].error and kinds[name].size != tuple(size)]
    if other:
        (height, width), of = survey.sizes[other[0]], kinds[other[0]].size
        found.problems.append(
            f"{len(other)} masks are of another size than their images, e.g. {other[0]}: {height} x {width} for "
            f"{of[0]} x {of[1]}; such pairs will be left out of fine-tuning: make them again at the images' size, or "
            "scale them without interpolation"
        )
    found.finetuning = {"train_mask_dir": args.masks, "mask_suffix": args.mask_suffix}
    ids = describe_classes(args, survey, found)
    check_split(ids, [name for name in ids if name in pooled({"validation": pairs.get("validation", {})})], found)
    labelled = max(2, training_share(pairs))
    found.finetuning |= {
        "num_channels": found.pretraining["num_channels"],
        "crop_size": max(32, found.pretraining["image_size"]),
        "long_edge": choose_scale([kind for kind in kinds.values() if not kind.error], survey.smallest, found),
        "per_device_train_batch_size": max(2, min(16, labelled // 2)),
    }
    found.finetuning |= choose_length(max(1, labelled // found.finetuning["per_device_train_batch_size"]), found)
    return masks


def choose_scale(readable: Sequence[ImageKind], smallest: float | None, found: Findings) -> int:
    """`long_edge` for fine-tuning, 0 for native resolution, by both sides and the smallest objects; says why."""
    size, patch = found.pretraining["image_size"], found.pretraining["patch_size"]
    short, long = (int(np.median([side(kind.size) for kind in readable])) for side in (min, max))
    factor, stride = min(1.0, size / long), patch / 4  # the finest feature map has a cell in so many pixels
    objects = "" if smallest is None else f"the smallest objects ({smallest:.1f} pixels thick)"
    if found.pretraining["native_tiles"]:
        reason = f"images are at least {2 * size} pixels a side"
    elif long >= THIN * short and long > size:
        reason = f"images are long and thin, made smaller to {size} pixels they would be {short * size // long} high"
    elif smallest is not None and factor < 1 and smallest * factor < stride:
        reason = f"made smaller to {size} pixels {objects} would be {smallest * factor:.1f}"
    else:
        found.lines.append(
            f"scale      the long edge at {size} pixels (long_edge: {size}), crops of {size}"
            + (f"; {objects} are then {smallest * factor:.1f}" if smallest is not None else "")
        )
        return int(size)
    found.lines.append(f"scale      native resolution (long_edge: 0), crops of {size}: {reason}")
    if smallest is not None and smallest < stride:
        found.lines.append(f"           {objects} are less than a cell of the feature maps, {stride:g} pixels")
    return 0


def choose_length(epoch_steps: int, found: Findings) -> dict[str, Any]:
    """Flags for few labelled images, of which the recipe's epochs are too few steps to learn from; says so."""
    epochs = int(read_yaml(recipe_path("industrial_upernet.yaml"))["num_train_epochs"])
    if epochs * epoch_steps >= STEPS:
        return {}
    found.lines.append(
        f"length     {-(-STEPS // epoch_steps)} epochs (num_train_epochs), {STEPS} steps: the recipe's {epochs} of "
        f"so few images are {epochs * epoch_steps} steps"
    )
    steps = {"eval_strategy": "steps", "eval_steps": STEPS // 20, "save_strategy": "steps", "save_steps": STEPS // 20}
    return {"num_train_epochs": -(-STEPS // epoch_steps), **steps}


def describe_classes(args: argparse.Namespace, survey: MaskSurvey, found: Findings) -> dict[str, Counter[str]]:
    """Class balance and the flags that name the classes; returns, of each mask, class -> pixels."""
    if not survey.pixels:
        return {}
    palette_file = args.palette
    if palette_file is None and survey.kind == "binary":
        palette_file = BINARY
        values = " and ".join(str(value) for value in sorted(survey.pixels)) if not survey.coloured else "0 and 255"
        found.lines.append(f"           they hold {values}: background and foreground (palette: binary)")
    elif palette_file is None and survey.kind == "palette":
        palette_file = str(Path(args.output_dir) / "palette.yaml")
        if written_here(Path(palette_file)):
            write_palette(Path(palette_file), survey)
        else:
            found.lines.append(f"           by {palette_file}, in which names have been put")
        values = f"{len(survey.pixels)} {'colours' if survey.coloured else 'grey values'}"
        found.problems.append(
            f"the masks hold {values}, not ids; {palette_file} lists them: put the names of the classes in it "
            f"({IGNORE} for what is not to be learned)"
        )
    elif palette_file is None and survey.kind == "smeared":
        found.problems.append(
            f"the masks hold {len(survey.pixels)} different values, as JPEG or smooth scaling makes them: "
            "save masks as PNG, scaled without interpolation"
        )
        return {}
    try:
        found.problems += check_kinds(survey.kinds, palette_file)
    except UserError as error:
        found.problems.append(str(error))
    if palette_file is not None:
        palette = Palette(palette_file, 255)
        known = {int(c): palette.names.get(int(i), IGNORE) for c, i in zip(palette.codes, palette.ids, strict=True)}
        codes = {value: value if survey.coloured else grey_code(value) for value in survey.pixels}
        names = {value: known.get(code, "not in the palette") for value, code in codes.items()}
        if palette_file == BINARY:
            names = {value: palette.names[min(value, 1)] for value in survey.pixels}
        order, found.finetuning["palette"] = [*palette.names.values(), IGNORE], palette_file
    else:
        classes = max((value for value in survey.pixels if value != 255), default=0) + 1
        drawn = args.label_names or [f"class {k}" for k in range(classes)]  # labels bring their names
        names = {value: "255 (ignored)" if value == 255 else drawn[value] for value in survey.pixels}
        order = drawn
        if not args.label_names:
            found.finetuning["num_labels"] = classes
    balance = {
        mask: sum((Counter({names[v]: n}) for v, n in values.items()), Counter())
        for mask, values in survey.values.items()
    }
    total = sum(balance.values(), Counter())
    for name in [*order, *(total.keys() - set(order))]:
        if name in total or name != IGNORE:
            share, holders = total[name] / total.total(), sum(name in counts for counts in balance.values())
            found.lines.append(f"           {name:<20} {share:8.3%} of the pixels, in {holders} masks")
    choose_balance(order, total, {name: sum(name in c for c in balance.values()) for name in total}, found)
    return balance


def choose_balance(
    order: Sequence[str], pixels: Mapping[str, int], holders: Mapping[str, int], found: Findings
) -> None:
    """Weights and crops for rare classes, as `hf_dbp.downstream.segmentation.rare` has them; says why."""
    classes = [name for name in order if name != IGNORE]
    counts = {name: pixels.get(name, 0) for name in classes}
    share = 1 / (4 * max(1, len(classes)))
    rare = [name for name, count in counts.items() if 0 < count < share * sum(counts.values())]
    if not rare:
        return
    found.finetuning["class_weights"] = "sqrt"
    found.lines.append(
        f"balance    {', '.join(rare)}: less than {share:.2%} of the pixels each, a quarter of an even share, so the "
        "loss weighs classes by one over the root of their share (class_weights: sqrt)"
    )
    masks = max(holders.values())
    seldom = [name for name in rare if holders[name] < SELDOM * masks]
    if seldom:
        found.finetuning["rare_crops"] = 0.33
        found.lines.append(
            f"           {', '.join(seldom)}: in less than {SELDOM:.0%} of the masks, so a third of the crops is drawn "
            "around rare classes (rare_crops: 0.33)"
        )


def check_split(balance: Mapping[str, Counter[str]], validation: Sequence[str], found: Findings) -> None:
    """Say which classes the validation masks lack; where none are given, find a seed whose draw lacks none."""
    names = list(balance)
    if len(names) < 2:
        return
    every = set().union(*balance.values())
    missing: set[str] = set()
    if validation:
        missing = every - set().union(*(balance[name] for name in validation))
        if missing:
            found.problems.append(
                f"{', '.join(sorted(missing))} is in no mask of the validation folder, so its IoU would not count; "
                "move images and masks with it there"
            )
        return
    for seed in range(100):
        held = set().union(*(balance[names[row]] for row in split_rows(len(names), VALIDATION, seed)[1]))
        if held == every:
            found.finetuning["subset_seed"] = seed
            return
        missing = missing or every - held
    found.problems.append(
        f"{', '.join(sorted(missing))} would be missing from the validation masks, so its IoU would not count; "
        "label more images of it, or give --validation_dir and --validation_mask_dir"
    )


def remove_earlier(recipe: Path) -> None:
    """Remove the recipe of an earlier inspection, which may have been of other data, so that none is left behind."""
    if recipe.is_file() and recipe.read_text(encoding="utf-8").startswith("# industrial_upernet.yaml with what"):
        recipe.unlink()


def write_recipe(path: Path, base: str, flags: Mapping[str, Any]) -> None:
    """The recipe ``base`` with these flags in place of its own."""
    content = read_yaml(recipe_path(base)) | {key: value for key, value in flags.items() if value not in (None, "", [])}
    lines = [f"# {base} with what `hf-dbp inspect` found; change what you like."]
    for key, value in content.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        plain = not isinstance(value, list) and re.fullmatch(r"[\w./+-]+", text)
        lines.append(f"{key}: {text if plain else json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_folders(args: argparse.Namespace, found: Findings) -> tuple[dict[str, Samples], dict[str, Pairs] | None]:
    """The images, and the pairs if there are masks that fit, of the splits that training takes; says what is left out.

    Raises:
        UserError: nothing to read, or masks in a folder of the images.
    """
    if args.masks is not None:
        if Path(args.folder).resolve() in Path(args.masks).resolve().parents:
            raise UserError(f"{args.masks} lies in {args.folder}, all of whose pictures are images; move it out")
        try:
            pairing = pair_folders(args.folder, args.masks, args.mask_suffix, args.channel_files)
        except UnpairedError as error:
            found.problems.append(str(error))
        else:
            describe_left_out(pairing.left_out, found)
            return pairing.images, pairing.pairs
    folder = open_pictures(args.folder)
    images = pick_splits(folder.pictures(args.channel_files, args.mask_suffix), args.folder, folder.left_out)
    describe_left_out(folder.left_out, found)
    return images, None


def describe_left_out(left_out: LeftOut, found: Findings) -> None:
    """What lies there and is not used."""
    found.problems += [line for line in left_out.lines() if "without a mask" not in line]
    if left_out.other_files:
        found.lines.append(f"others     files that hold no images: {common(left_out.other_files)}")


def inspect_folder(args: argparse.Namespace) -> Findings:
    """Read everything, write the files, and return what to print."""
    found = Findings()
    labels, args.label_names = args.masks, None
    if labels is not None and is_labels(labels):
        args.masks, args.label_names = mask_folder(labels, args.folder)
        found.lines.append(f"labels     {label_format(Path(labels))}, drawn as masks of {', '.join(args.label_names)}")
    taken, pairs = read_folders(args, found)
    samples, masks = pooled(taken), {}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    remove_earlier(output / "finetune.yaml")
    kinds = survey_images(samples)
    choose_pretraining(training_share(taken), describe_images(samples, kinds, found), found)
    data = {"train_dir": args.folder, "channel_files": args.channel_files}
    if args.masks is not None and Path(args.masks).resolve() == Path(args.folder).resolve():
        data["mask_suffix"] = args.mask_suffix
    write_recipe(output / "pretrain.yaml", "industrial.yaml", data | found.pretraining)
    commands = [f"hf-dbp pretrain --config {shlex.quote(str(output / 'pretrain.yaml'))}",
                "hf-dbp fuse outputs/industrial --output_dir outputs/industrial-fused"]  # fmt: skip
    if pairs is not None:
        masks = describe_masks(args, pairs, kinds, found)
        if args.label_names:
            found.finetuning["train_mask_dir"] = labels
        if found.finetuning:
            flags = {"model_name_or_path": "outputs/industrial-fused"} | data | found.finetuning
            write_recipe(output / "finetune.yaml", "industrial_upernet.yaml", flags)
            commands.append(f"hf-dbp finetune --config {shlex.quote(str(output / 'finetune.yaml'))}")
    readable = {name: files for name, files in samples.items() if not kinds[name].error}
    write_contact_sheet(output / "contact_sheet.png", readable, masks, found.finetuning.get("palette"))
    found.lines += ["", *(f"PROBLEM    {problem}" for problem in found.problems)]
    found.lines += [f"written    contact_sheet.png and the recipes, in {output}", "next       " + commands[0]]
    found.lines += [" " * 11 + command for command in commands[1:]]
    return found


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run. User mistakes end with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="hf-dbp inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder of images, nested as it is")
    parser.add_argument("--masks", help="masks, named as the images, or labels (COCO, LabelMe, YOLO, CVAT)")
    parser.add_argument("--mask_suffix", default="", help="what mask names end in beyond their images', e.g. _mask")
    parser.add_argument("--palette", help="YAML file of class names and colours, or `binary` for 0/255 masks")
    parser.add_argument(
        "--channel_files", nargs="+", help="a file per channel: a name pattern each, '*_ch0.tif' '*_ch1.tif'"
    )
    parser.add_argument("--output_dir", default="outputs/inspection", help="where recipes and contact sheet go")
    print("\n".join(inspect_folder(parser.parse_args(arguments)).lines))
