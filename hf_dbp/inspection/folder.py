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
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dbp.data.arguments import FolderFlags
from hf_dbp.data.labels.formats import label_format
from hf_dbp.data.labels.masks import is_labels, mask_folder
from hf_dbp.downstream.detection.data import ObjectImages, ObjectSource
from hf_dbp.downstream.segmentation.source import LabelFlags
from hf_dbp.errors import UserError, command
from hf_dbp.flags import flags_of
from hf_dbp.inspection.choices import (
    Findings,
    choose_pretraining,
    choose_size,
    common,
)
from hf_dbp.inspection.class_folders import describe_class_folders
from hf_dbp.inspection.contact_sheet import write_contact_sheet
from hf_dbp.inspection.image_report import describe_images, pooled, training_share
from hf_dbp.inspection.mask_report import describe_masks
from hf_dbp.inspection.object_survey import (
    BASE,
    choose_object_split,
    describe_objects,
    open_objects,
    write_box_sheet,
)
from hf_dbp.inspection.reading import Content, Samples, read_source
from hf_dbp.inspection.rehearsal import hearing, known, rehearse, unsaid
from hf_dbp.inspection.survey import ImageKind, survey_images
from hf_dbp.recipes import read_yaml, recipe_path

__all__ = ["inspect_folder", "main"]


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
