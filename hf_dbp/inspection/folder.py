"""Report what a folder contains, how it will be used, and recipes to start from: the main of `hf-dbp inspect`.

    hf-dbp inspect IMAGES --masks MASKS [--background_dir GOOD_IMAGES]
    hf-dbp inspect IMAGES LABELS
    hf-dbp inspect FOLDER_OF_PARQUET_OR_TARS
    hf-dbp inspect --dataset_name HUB_ID

reads every image and mask with the code of training, prints a report, and writes `contact_sheet.png`, `pretrain.yaml`,
`finetune.yaml` if there are masks, `detect.yaml` if objects are to be found, and `palette.yaml`, to fill in class
names, for colour masks without a palette file. The recipes are `industrial.yaml`, `industrial_upernet.yaml` and
`industrial_detector.yaml`, completed with the findings; training's loaders open the data with them, and their messages
are reported too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_dbp.data.arguments import FolderFlags
from hf_dbp.data.decoding import UnreadableImageError, check_fit, unturned_masks, wrong_channels
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.labels.formats import label_format
from hf_dbp.data.labels.masks import is_labels, mask_folder
from hf_dbp.data.masks import BINARY, IGNORE, Palette, check_kinds, grey_code
from hf_dbp.downstream.detection.data import ObjectImages, ObjectSource
from hf_dbp.downstream.segmentation.background import background_files
from hf_dbp.downstream.segmentation.data import load_labelled_images
from hf_dbp.downstream.segmentation.source import LabelFlags, SegmentationSource
from hf_dbp.errors import UserError, command
from hf_dbp.flags import flags_of
from hf_dbp.inspection.choices import (
    VALIDATION,
    Findings,
    choose_balance,
    choose_batch,
    choose_length,
    choose_pretraining,
    choose_scale,
    choose_size,
    choose_split,
    common,
    held_by_crops,
)
from hf_dbp.inspection.class_folders import describe_class_folders
from hf_dbp.inspection.contact_sheet import write_contact_sheet
from hf_dbp.inspection.mask_survey import MaskSurvey, survey_masks, write_palette, written_here
from hf_dbp.inspection.object_survey import (
    BASE,
    choose_object_split,
    describe_objects,
    open_objects,
    write_box_sheet,
)
from hf_dbp.inspection.reading import Content, Samples, read_source, value_of
from hf_dbp.inspection.survey import ImageKind, copies, survey_images
from hf_dbp.recipes import read_yaml, recipe_path

__all__ = ["inspect_folder", "main"]

T = TypeVar("T")
OUTLYING = 0.01  # if 99.8 % of the values span less of the range, there are outliers


def pooled(splits: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What inspect found in all splits, as one; names outside ``train`` begin with the name of their split."""
    return {
        name if split == "train" else f"{split}/{name}": value
        for split, content in splits.items()
        for name, value in content.items()
    }


def training_share(splits: Mapping[str, Collection[Any]]) -> int:
    """The number that training will see: ``train`` minus the held-out share if there is no ``validation``."""
    count = len(splits["train"])
    return count if splits.get("validation") else count - max(1, round(count * VALIDATION))


def describe_images(
    samples: Samples, files: Sequence[str], kinds: Mapping[str, ImageKind], found: Findings
) -> list[ImageKind]:
    """Report counts, sizes, channels, depth, unreadable files and duplicates; return the kinds of the readable
    images."""
    readable = [kind for kind in kinds.values() if not kind.error]
    if not readable:
        raise UserError(f"none of the {len(samples)} images can be read, e.g. {next(iter(kinds.values())).error}")
    suffixes = Counter(Path(file).suffix.lower() for file in files)
    gigabytes = sum(Path(file).stat().st_size for file in files) / 1e9
    sides = np.array([sorted(kind.size) for kind in readable])
    ratios = sides[:, 1] / sides[:, 0]
    found.lines += [
        f"images     {len(samples)}"
        + (f" in {len(files)} files: {common(suffixes)}; {gigabytes:.2f} GB" * bool(files)),
        f"sizes      {common(Counter(f'{k.size[0]} x {k.size[1]}' for k in readable))} (height x width)",
        f"aspect     the long side is {np.median(ratios):.3g} times the short one ({ratios.min():.3g} to "
        f"{ratios.max():.3g}); sides of {np.median(sides[:, 0]):.0f} and {np.median(sides[:, 1]):.0f} pixels (medians)",
        f"channels   {common(Counter(f'{k.channels} of {k.dtype}' for k in readable))}",
    ]
    describe_values(readable, found)
    infinite = [kind.error for kind in kinds.values() if not kind.finite]
    if infinite:
        found.problems.append(
            f"{len(infinite)} of {len(samples)} images will be left out of training, e.g. {infinite[0]}"
        )
    errors = [kind.error for kind in kinds.values() if kind.error and kind.finite]
    if errors:
        found.problems.append(
            f"{len(errors)} of {len(samples)} images cannot be read and will be left out of training, e.g. "
            f"{errors[0]}; repair them or move them away"
        )
    groups = copies(samples, kinds)
    if groups:
        what = "images" if any(kind.digest for kind in readable) else "files"
        found.problems.append(
            f"{sum(len(group) - 1 for group in groups)} {what} are copies of others, e.g. {' = '.join(groups[0][:2])}; "
            "a copy in training and validation makes validation look better than it is: leave one of each"
        )
    return readable


def describe_values(readable: Sequence[ImageKind], found: Findings) -> None:
    """Report the range of each type of values, and how it is used; see `hf_dbp.data.values`."""
    floats = [kind for kind in readable if kind.dtype.startswith("float")]
    unit = bool(floats) and min(kind.low for kind in floats) >= 0 and max(kind.high for kind in floats) <= 1
    for stored, count in Counter(kind.stored for kind in readable).most_common(3):
        kinds = [kind for kind in readable if kind.stored == stored]
        low, high = min(kind.low for kind in kinds), max(kind.high for kind in kinds)
        if kinds[0].dtype.startswith("uint"):
            done = f"divided by {np.iinfo(kinds[0].dtype).max}"
        elif unit:
            done = "used unchanged"
        else:
            done = "this range, measured on the training images, becomes 0 to 1"
        found.lines.append(f"values     {low:g} to {high:g} of {stored} ({count} images): {done}")
        bulk = min(kind.bulk[0] for kind in kinds), max(kind.bulk[1] for kind in kinds)
        if kinds[0].dtype.startswith("float") and bulk[1] - bulk[0] < OUTLYING * (high - low):
            found.problems.append(
                f"values of {stored} reach from {low:g} to {high:g}, but 99.8 % of them lie between {bulk[0]:g} and "
                f"{bulk[1]:g}: outliers, or markers of missing data, compress everything else; replace them"
            )


def survey_background(args: argparse.Namespace, found: Findings) -> list[ImageKind]:
    """Report on the good images, and return the kinds of those that training can use.

    Raises:
        UserError: there are no pictures in the folder.
    """
    if args.background_dir is None:
        return []
    good, left_out = background_files(args.background_dir, args.channel_files)
    found.problems += left_out.lines()
    samples: Samples = {files[0]: files for files in good}
    kinds, channels = survey_images(samples), found.pretraining["num_channels"]
    usable = [
        kind
        for kind in kinds.values()
        if not kind.error and (kind.counted == channels or (kind.counted, channels) == (1, 3))
    ]
    found.lines.append(f"background {len(usable)} good images in {args.background_dir}: they count as class 0")
    odd = next((kind for kind in kinds.values() if kind not in usable), None)
    if odd is not None:
        reason = odd.error or f"{odd.name}: {wrong_channels((*odd.size, odd.counted), channels)}"
        found.problems.append(
            f"{len(kinds) - len(usable)} of {len(kinds)} good images will be left out of training, e.g. {reason}"
        )
    return usable


def describe_masks(
    args: argparse.Namespace, content: Content, kinds: Mapping[str, ImageKind], found: Findings
) -> Samples:
    """Report kind of masks, sizes, objects and class balance, and choose flags; return the masks by image."""
    pairs = content.pairs or {}
    masks = {name: pair[1] for name, pair in pooled(pairs).items()}
    crop = max(32, found.pretraining["image_size"])
    survey = survey_masks(masks, args.palette not in (None, BINARY), crop)
    found.lines += [
        "",
        f"masks      {len(masks)}; {len(kinds) - len(masks)} images have none and are used only for pre-training",
    ]
    if survey.errors:
        found.problems.append(
            f"{len(survey.errors)} masks cannot be read and will be left out of fine-tuning with their images, e.g. "
            f"{next(iter(survey.errors.values()))}; repair them or move them away"
        )
    if survey.refused:
        found.problems.append(
            f"{len(survey.refused)} masks are not understood, which ends fine-tuning, e.g. "
            f"{next(iter(survey.refused.values()))}"
        )
    values = ((value_of(image), value_of(mask)) for image, mask in pooled(pairs).values())
    if warning := unturned_masks(values):
        found.problems.append(warning)
    misfits = [reason for name in survey.sizes if (reason := misfit(kinds[name], survey, name))]
    if misfits:
        found.problems.append(
            f"{len(misfits)} masks differ in size from their images; both will be left out of fine-tuning, e.g. "
            f"{misfits[0]}"
        )
    count = sum(map(len, survey.objects.values()))
    if (smallest := survey.smallest()) is not None:
        found.lines.append(
            f"objects    {count} outside the most common class; the smallest are {smallest:.1f} pixels thick (tenth "
            "percentile of area by longer side)"
        )
    found.finetuning = dict(content.mask_flags)
    found.finetuning |= {"num_channels": found.pretraining["num_channels"], "crop_size": crop}
    found.finetuning["long_edge"] = choose_scale([kind for kind in kinds.values() if not kind.error], survey, found)
    good = survey_background(args, found)
    ids = describe_classes(args, survey, good, found)
    if not ids:
        found.finetuning = {}
        return masks
    if not pairs.get("validation"):
        seed = choose_split({name: ids.get(name, Counter()) for name in masks})
        found.finetuning |= {} if seed is None else {"subset_seed": seed}
    if good:
        found.finetuning["background_dir"] = args.background_dir
    labelled = max(2, training_share({**pairs, "train": [*pairs["train"], *good]}))
    batch = found.finetuning["per_device_train_batch_size"] = choose_batch(labelled)
    found.finetuning |= choose_length(max(1, labelled // batch), found)
    return masks


def misfit(kind: ImageKind, survey: MaskSurvey, name: str) -> str:
    """Training's message, for inspect, on a mask whose size differs from its image's; empty if they fit or the image is
    unreadable."""
    try:
        check_fit(survey.sizes[name], survey.sizes[name] if kind.error else kind.size, survey.names[name])
    except UnreadableImageError as error:
        return str(error)
    return ""


def describe_classes(
    args: argparse.Namespace, survey: MaskSurvey, good: Sequence[ImageKind], found: Findings
) -> dict[str, Counter[str]]:
    """Report class balance, and choose the flags that name the classes; return class -> pixels for each mask."""
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
            found.lines.append(f"           by {palette_file}, which has been edited")
        values = f"{len(survey.pixels)} {'colours' if survey.coloured else 'grey values'}"
        found.problems.append(
            f"the masks hold {values}, not ids; {palette_file} lists them: fill in the names of the classes ({IGNORE} "
            f"for pixels not to be learned)"
        )
    elif palette_file is None and survey.kind == "smeared":
        found.problems.append(
            f"the masks hold {len(survey.pixels)} different values, as from JPEG or smooth scaling: "
            "save masks as PNG, scaled without interpolation"
        )
        return {}
    try:
        found.problems += check_kinds({survey.names[n]: kind for n, kind in survey.kinds.items()}, palette_file)
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
        drawn = args.label_names or [f"class {k}" for k in range(classes)]  # labels have names
        names = {value: "255 (ignored)" if value == 255 else drawn[value] for value in survey.pixels}
        order = drawn
        if not args.label_names:
            found.finetuning["num_labels"] = classes
    balance = {
        mask: sum((Counter({names[v]: n}) for v, n in values.items()), Counter())
        for mask, values in survey.values.items()
    }
    total = sum(balance.values(), Counter({order[0]: sum(math.prod(kind.size) for kind in good)}))
    for name in [*order, *(total.keys() - set(order))]:
        if name in total or name != IGNORE:
            share, holders = total[name] / total.total(), sum(name in counts for counts in balance.values())
            found.lines.append(f"           {name:<20} {share:8.3%} of the pixels, in {holders} masks")
    chances = held_by_crops(survey, names, found)
    share = len(survey.chances) / max(1, len(survey.chances) + len(good))  # of crops that see a mask
    chances = {name: chance if name == order[0] else chance * share for name, chance in chances.items()}
    choose_balance([name for name in order if name != IGNORE], total, chances, found)
    return balance


def remove_earlier(recipe: Path, base: str) -> None:
    """Remove the recipe of an earlier inspection, which may have been for other data."""
    if recipe.is_file() and recipe.read_text(encoding="utf-8").startswith(f"# {base} with what"):
        recipe.unlink()


def write_recipe(path: Path, base: str, flags: Mapping[str, Any]) -> None:
    """Write the recipe ``base`` with these flags replacing its own."""
    content = read_yaml(recipe_path(base)) | {key: value for key, value in flags.items() if value not in (None, "", [])}
    lines = [f"# {base} with what `hf-dbp inspect` found; edit it as you like."]
    for key, value in content.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        plain = not isinstance(value, list) and re.fullmatch(r"[\w./+-]+", text)
        lines.append(f"{key}: {text if plain else json.dumps(value, allow_nan=False)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_left_out(content: Content, found: Findings) -> None:
    """Report what is in the source but not used."""
    left_out = content.left_out
    found.problems += [content.problem] if content.problem else []
    found.problems += [line for line in left_out.lines() if "without a mask" not in line]
    if left_out.other_files:
        found.lines.append(f"others     files that hold no images: {common(left_out.other_files)}")


class Heard(logging.Handler):
    """Collects the warnings of training's code instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def known(source: type[ImageSource], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inspected flags that a source has."""
    names = {field.name for field in dataclasses.fields(source) if field.init}
    return {name: value for name, value in flags.items() if name in names and value is not None}


def rehearse(data: Mapping[str, Any], found: Findings) -> list[str]:
    """The messages of training's loaders about the data with the flags of the recipes, except those already reported.

    Args:
        data: flags that name the images.
        found: findings with the flags of the recipes and the problems already reported.
    """
    with hearing() as messages:
        if found.finetuning:
            flags = known(SegmentationSource, {**data, **found.finetuning})
            load_labelled_images(SegmentationSource(**flags, seed=flags.get("subset_seed", 0)))
        load_images(ImageSource(**known(ImageSource, {**data, **found.pretraining})))
    return unsaid(messages, found)


@contextlib.contextmanager
def hearing() -> Iterator[list[str]]:
    """The warnings of training's code, and the mistake that ends it."""
    heard, logger = Heard(), logging.getLogger("hf_dbp")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(heard)
    try:
        yield heard.messages
    except UserError as error:
        heard.messages.append(str(error))
    finally:
        logger.removeHandler(heard)
        logger.propagate = propagated


def unsaid(messages: Sequence[str], found: Findings) -> list[str]:
    """The messages that are not reported yet."""
    said = {gist(problem) for problem in found.problems}
    fresh = (
        message for message in dict.fromkeys(messages) if " left out: " not in message
    )  # these are already reported
    text = "\n".join(found.problems)
    reasons = ((message, message.partition(": ")[2] or message) for message in fresh)
    return [message for message, reason in reasons if gist(reason) not in said and reason not in text]


def gist(message: str) -> str:
    """A warning without its example and its counts, which differ between parts of the data."""
    return re.sub(r"\d+", "N", message.partition(", e.g. ")[0])


def inspect_folder(args: argparse.Namespace) -> Findings:
    """Read everything, write the files, and return what to print."""
    found = Findings()
    labels, args.label_names = args.masks, None
    labelled = labels is not None and is_labels(labels)
    if labelled and args.task == "detection":
        found.lines.append(f"labels     {label_format(Path(str(labels)))}, each shape an object")
        args.masks = None
    elif labelled:
        args.masks, args.label_names = mask_folder(labels, args.folder)
        found.lines.append(f"labels     {label_format(Path(labels))}, drawn as masks of {', '.join(args.label_names)}")
    content = read_source(args)
    if args.task == "detection" and not (labelled or content.pairs or content.problem):
        raise UserError("--task detection needs labels or masks of the objects: hf-dbp inspect IMAGES LABELS")
    describe_left_out(content, found)
    samples = pooled(content.images)
    masks: Samples = {}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    remove_earlier(output / "finetune.yaml", "industrial_upernet.yaml")
    remove_earlier(output / "detect.yaml", BASE)
    kinds = survey_images(samples)
    readable = describe_images(samples, content.files, kinds, found)
    choose_pretraining(training_share(content.images), readable, found)
    head = choose_size(found, masks=content.pairs is not None)
    data = {"dataset_name": args.dataset_name, "dataset_config_name": args.dataset_config_name}
    data |= {"train_dir": args.folder, "channel_files": args.channel_files} | content.flags
    if args.masks is not None and Path(args.masks).resolve() == Path(args.folder).resolve():
        data["mask_suffix"] = args.mask_suffix
    write_recipe(output / "pretrain.yaml", "industrial.yaml", data | found.pretraining)
    commands = [f"hf-dbp pretrain --config {shlex.quote(str(output / 'pretrain.yaml'))}",
                "hf-dbp fuse outputs/industrial --output_dir outputs/industrial-fused"]  # fmt: skip
    if content.pairs is not None:
        masks = describe_masks(args, content, kinds, found)
        if found.finetuning:
            found.finetuning |= {"train_mask_dir": labels} if args.label_names else {}
            flags = {"model_name_or_path": "outputs/industrial-fused"} | data | head | found.finetuning
            write_recipe(output / "finetune.yaml", "industrial_upernet.yaml", flags)
            commands.append(f"hf-dbp finetune --config {shlex.quote(str(output / 'finetune.yaml'))}")
    objects = None
    if args.task == "detection" and (labelled or found.finetuning):
        flags = data | found.finetuning | ({"train_mask_dir": labels} if labelled else {})
        objects = inspect_objects(flags, kinds, found, output / "detect.yaml")
        if found.detection:
            commands.append(f"hf-dbp detect --config {shlex.quote(str(output / 'detect.yaml'))}")
        else:
            found.problems.append("no detect.yaml was written, for training would end with the problems above")
    if labels is None and (classify := describe_class_folders(content.images, args.folder, found)):
        commands.append(classify)
    found.problems += rehearse(data, found)
    shown = {name: sample for name, sample in samples.items() if not kinds[name].error}
    if objects is None:
        write_contact_sheet(output / "contact_sheet.png", shown, masks, found.finetuning.get("palette"))
    else:
        write_box_sheet(output / "contact_sheet.png", objects)
    found.lines += ["", *(f"PROBLEM    {problem}" for problem in found.problems)]
    found.lines += [f"written    contact_sheet.png and the recipes, in {output}", "next       " + commands[0]]
    found.lines += [" " * 11 + command for command in commands[1:]]
    return found


def inspect_objects(
    flags: Mapping[str, Any], kinds: Mapping[str, ImageKind], found: Findings, recipe: Path
) -> tuple[ObjectImages, ObjectImages] | None:
    """Report the objects and write the recipe of the detector; return the lists, or None if training refuses them.

    Args:
        flags: those that name images and labels.
        kinds: the kinds of all images, by name.
        found: collects lines and problems.
        recipe: the file to write.
    """
    source = known(ObjectSource, {**flags, "num_channels": found.pretraining["num_channels"]})
    objects = None
    with hearing() as messages:
        objects = open_objects(source)
    if objects is not None and (seed := choose_object_split(objects)):
        source["subset_seed"] = seed
        with hearing() as messages:
            objects = open_objects(source)
    if objects is not None:
        describe_objects(objects, kinds, found)
    if found.detection:
        own = {"model_name_or_path": "outputs/industrial-fused"} | source | found.detection
        write_recipe(recipe, BASE, own)
    found.problems += unsaid(messages, found)
    return objects


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run. A user's mistake ends with one line on stderr and exit status 2."""
    images = ("channel_files", "dataset_name", "dataset_config_name", "image_column_name", "mask_suffix")
    declared = [
        flags_of(FolderFlags, *images),
        flags_of(LabelFlags, "annotation_column_name", "background_dir", "palette"),
    ]
    parser = argparse.ArgumentParser(prog="hf-dbp inspect", description=__doc__.split("\n\n")[0], parents=declared)
    parser.add_argument(
        "folder",
        nargs="?",
        help="Folder of images (any subfolders), parquet files or tars; or give --dataset_name.",
    )
    parser.add_argument(
        "labels", nargs="?", help="Labels of objects to find (COCO, LabelMe, YOLO, CVAT), or masks of them."
    )
    parser.add_argument("--masks", help="Masks, named like the images, or labels (COCO, LabelMe, YOLO, CVAT).")
    parser.add_argument(
        "--task",
        choices=["segmentation", "detection"],
        help="What the labels are for (default: detection if they are given without --masks, else segmentation).",
    )
    parser.add_argument("--output_dir", default="outputs/inspection", help="Folder for recipes and contact sheet.")
    args = parser.parse_args(arguments)
    if (args.folder is None) == (args.dataset_name is None):
        raise UserError("name what to inspect: a folder, or --dataset_name HUB_ID (not both)")
    if args.labels is not None and args.masks is not None:
        raise UserError(f"labels are given twice, {args.labels} and --masks {args.masks}; leave one out")
    args.task = args.task or ("segmentation" if args.labels is None else "detection")
    args.masks = args.labels or args.masks
    print("\n".join(inspect_folder(args).lines))
