"""What inspect says of masks and classes, and the flags of `hf-dbp finetune` that follow."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_dbp.data.decoding import UnreadableImageError, check_fit, unturned_masks, wrong_channels
from hf_dbp.data.masks import BINARY, IGNORE, Palette, check_kinds, grey_code
from hf_dbp.downstream.segmentation.background import background_files
from hf_dbp.errors import UserError
from hf_dbp.inspection.choices import (
    Findings,
    choose_balance,
    choose_batch,
    choose_length,
    choose_scale,
    choose_split,
    held_by_crops,
)
from hf_dbp.inspection.image_report import pooled, training_share
from hf_dbp.inspection.mask_survey import MaskSurvey, survey_masks, write_palette, written_here
from hf_dbp.inspection.reading import Content, Samples, value_of
from hf_dbp.inspection.survey import ImageKind, survey_images

__all__ = ["describe_masks"]


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
