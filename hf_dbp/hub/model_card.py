"""The README.md of a model as a Hub model card: what was trained, on what, how, and the measured results.

    python -m hf_dbp.hub.model_card outputs/demo-fused --output_dir model_cards/demo

Everything specific to a model is read from the files in its folder: `config.json`, the record (`run.json` of
pre-training, `eval.json` of fine-tuning) and the pictures. A figure that the record lacks is left out. The surrounding
text is `model_card.md.jinja`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_dbp.downstream.classification import arguments as classification
from hf_dbp.downstream.detection import arguments as detection
from hf_dbp.downstream.segmentation import arguments as segmentation
from hf_dbp.downstream.segmentation.evaluation_settings import EVALUATED
from hf_dbp.errors import UserError, command
from hf_dbp.hub.card_metadata import (
    RESULTS,
    energy_source,
    figures,
    finds_masks,
    hardware_used,
    metadata,
    shown,
    stock_pipeline,
)
from hf_dbp.natures import Nature, natures
from hf_dbp.training import arguments as pretraining

__all__ = ["CARD", "main", "write_card"]

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
RECORDS = ("run.json", "eval.json")
METHODS = {
    "dbp": "decorrelated backpropagation (DBP)",
    "bp": "plain backpropagation",
    "stock": "plain backpropagation",
}
PICTURES = {
    "curves.png": "Loss by optimizer step.",
    "reconstruction.png": "Validation images, what the encoder saw of them, and what the decoder filled in.",
    "predictions.png": "Validation images, what is true, and predictions.",
    "confusion.png": "Validation images by true and predicted class, as shares of each true class.",
    "calibration.png": "How often predictions with a stated probability are correct.",
    "mistakes.png": "The most confident mistakes on the validation images.",
    "worst.png": "The validation images with the lowest mean IoU, worst first.",
}
CLASS_FIGURES = {  # task -> figures of each class and their titles; a record of 0.1.0 has only the first and the last
    "segmentation": {"iou": "IoU", "dice": "Dice", "precision": "precision", "recall": "recall", "accuracy": "accuracy",
                     "pixels": "pixels"},
    "classification": {"recall": "recall", "precision": "precision", "f1": "F1", "images": "images"},
    "detection": {"ap": "AP", "ap_50": "AP50", "mask_ap": "AP of masks", "recall": "recall", "objects": "objects"},
}  # fmt: skip


def write_card(folder: Path, name: str | None = None) -> Path:
    """Write the card of the model in ``folder`` there; return its path.

    Args:
        folder: holds `config.json` and, for a card that says more than how to load the model, a record.
        name: Hub id of the model; default: the folder.

    Raises:
        UserError: there is no model, or one that this library does not make.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model (config.json) to write a card for")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record_file = next((folder / file for file in RECORDS if (folder / file).is_file()), None)
    record = {} if record_file is None else json.loads(record_file.read_text(encoding="utf-8"))
    processor = read_processor(folder)
    facts = card_facts(config, record, processor, name or str(folder))
    card = ModelCard.from_template(
        card_data=metadata(config, record, processor, facts["title"]),
        template_path=str(TEMPLATE),
        pictures=[(file, caption) for file, caption in PICTURES.items() if (folder / file).is_file()],
        record_file=record_file and record_file.name,
        **facts,
    )
    card.save(folder / CARD)
    return folder / CARD


# ---- content of the card ----


def read_processor(folder: Path) -> dict[str, Any]:
    """The settings of the image processor in a folder; empty if there is none."""
    file = folder / "preprocessor_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def card_facts(
    config: Mapping[str, Any], record: Mapping[str, Any], processor: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The values for the template, except metadata and pictures."""
    kind = config["model_type"]
    if kind not in LOADING:
        raise UserError(f"cards are for {', '.join(LOADING)} models, not for {kind}")
    title = name.rstrip("/").rpartition("/")[2]
    return {
        "title": title,
        "summary": summary(config, record),
        "loading": LOADING[kind].format(name=name, architecture=(config.get("architectures") or [""])[0]),
        "usage": usage(config, record),
        "results": [
            (label, f"{figures(record)[key]:.4g}") for key, (label, _) in RESULTS.items() if key in figures(record)
        ],
        "class_columns": ["class", *class_columns(record).values()],
        "per_class": [
            (label, *(cell(row.get(key)) for key in class_columns(record)))
            for label, row in record.get("per_class", {}).items()
        ],
        "training": training(record),
        "limits": limits(config, record, processor),
    }


def class_columns(record: Mapping[str, Any]) -> dict[str, str]:
    """The figures given for each class, by name, with their titles."""
    rows = record.get("per_class", {}).values()
    titles = CLASS_FIGURES.get(record.get("task", ""), {})
    return {key: title for key, title in titles.items() if key != "mask_ap" or any(key in row for row in rows)}


def cell(value: float | int | None) -> str:
    """A figure or a count as a cell of the card's table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


LOADING = {
    "vit": """\
from transformers import AutoImageProcessor, ViTModel
processor = AutoImageProcessor.from_pretrained("{name}")
model = ViTModel.from_pretrained("{name}", add_pooling_layer=False)""",
    "dinov2": """\
from transformers import AutoImageProcessor, Dinov2Model
processor = AutoImageProcessor.from_pretrained("{name}")
model = Dinov2Model.from_pretrained("{name}")""",
    "upernet": """\
import hf_dbp
found = hf_dbp.predict("{name}", "photos", "predictions")  # a folder of images or one image; masks and a table
print(found.rows[0])

# stock, without hf_dbp
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation
processor = AutoImageProcessor.from_pretrained("{name}")
model = UperNetForSemanticSegmentation.from_pretrained("{name}")""",
    "eomt": """\
import hf_dbp
found = hf_dbp.predict("{name}", "photos", "predictions")  # a folder of images or one image; masks and a table
print(found.rows[0])

# stock, without hf_dbp
from transformers import AutoImageProcessor, EomtForUniversalSegmentation
processor = AutoImageProcessor.from_pretrained("{name}")
model = EomtForUniversalSegmentation.from_pretrained("{name}")""",
    "beit": """\
from transformers import AutoImageProcessor, AutoModelForImageClassification
processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")""",
    "rf_detr": """\
import hf_dbp
found = hf_dbp.predict("{name}", "photos", "predictions")  # a folder of images or one image; a table of boxes
print(found.rows[0])

# stock, without hf_dbp
from transformers import AutoImageProcessor, {architecture}
processor = AutoImageProcessor.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}")""",
    "dbp_vit_mae": """\
from hf_dbp import load_fused_vit
model = load_fused_vit("{name}")  # a stock ViTModel; W R replaces (W, R)""",
    "vit_mae": """\
from transformers import AutoImageProcessor, ViTMAEForPreTraining
processor = AutoImageProcessor.from_pretrained("{name}")
model = ViTMAEForPreTraining.from_pretrained("{name}")""",
}


def summary(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The card's first sentences: what the model is and what it was trained on."""
    kind, encoder = config["model_type"], config.get("backbone_config") or config
    shape = (
        f"{encoder['num_hidden_layers']} layers, {encoder['hidden_size']} wide, patches of {encoder['patch_size']} "
        f"pixels, {encoder['num_channels']} channels"
    )
    found = "objects and their masks" if finds_masks(config) else "objects"
    what = {
        "vit": f"A stock Vision Transformer ({shape})",
        "dinov2": f"A Vision Transformer as a stock DINOv2 whose LayerScale is 1 ({shape})",
        "upernet": f"UperNet for semantic segmentation over a Vision Transformer ({shape}), stock transformers",
        "eomt": f"EoMT for semantic segmentation, a Vision Transformer with queries ({shape}), stock transformers",
        "beit": f"An image classifier over a Vision Transformer ({shape}), stock transformers",
        "rf_detr": f"An RF-DETR that finds {found} over a Vision Transformer ({shape}), stock transformers",
        "dbp_vit_mae": f"A masked autoencoder with the unfused matrices of decorrelated training ({shape})",
        "vit_mae": f"A masked autoencoder ({shape})",
    }[kind]
    if kind == "dbp_vit_mae" and config.get("decorrelated_layers") == "none":
        what = f"A masked autoencoder ({shape})"
    if not record:
        return f"{what}."
    how = "fine-tuned"
    if record["task"] == "pretraining":
        masked = record["arguments"]["mask_ratio"]
        method = METHODS[record["method"]]
        how = f"pre-trained as a masked autoencoder ({masked:.0%} of the patches masked) with {method}"
    data = record["data"]
    counts = f"{data['train_images']} training and {data['validation_images']} validation images"
    text = f"{what}, {how} on {shown(data['source'])}: {counts}."
    start = record["arguments"].get("model_name_or_path")
    return f"{text} It started from {shown(start)}." if start else text


def usage(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The card's text below the lines that load the model."""
    kind, encoder = config["model_type"], config.get("backbone_config") or config
    if kind == "dbp_vit_mae":
        return (
            "Use these weights to continue training. Stock transformers classes refuse the folder, because without "
            "its matrices R the network is a different one."
        )
    given = "images" if encoder["num_channels"] == 3 else 'images, input_data_format="channels_last"'
    result = "logits" if kind in ("upernet", "beit", "rf_detr", "vit_mae") else "last_hidden_state"
    text = f'`model(**processor({given}, return_tensors="pt")).{result}` is its output'
    if kind == "upernet":
        text = f"{windows(config)} Of the stock model {text}"
    if kind == "eomt":
        side = config["image_size"]
        text = (
            f"{windows(config)} The stock model takes crops of {side} x {side} pixels alone: of such images, "
            f'`processor.post_process_semantic_segmentation(model(**processor({given}, return_tensors="pt")), '
            f'target_sizes=[({side}, {side})], size={{"shortest_edge": {side}, "longest_edge": {side}}})` gives the '
            f"class ids"
        )
    if kind == "rf_detr":
        masks = ", and `pred_masks` their masks at a quarter of the input's size" if finds_masks(config) else ""
        text = (
            f'`processor.post_process_object_detection(model(**processor({given}, return_tensors="pt")), '
            f"target_sizes=[(height, width)])` gives scores, labels and boxes in pixels{masks}"
        )
    if encoder["num_channels"] in (1, 3):
        return f"{text}."
    text += f" for arrays of {encoder['num_channels']} channels. Stock resizing would take one of them for alpha"
    arguments = record.get("arguments", {})
    long_edge = arguments.get("crop_size") if arguments.get("long_edge") is None else arguments["long_edge"]
    if kind in segmentation.HEADS:
        return (
            f"{text}: scale them before, as in training to a long edge of {long_edge} pixels."
            if long_edge
            else f"{text}."
        )
    size = record["data"]["size"] if kind == "rf_detr" and record else encoder["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"{text}: bring them to {height} x {width} pixels before."


def windows(config: Mapping[str, Any]) -> str:
    """How prediction reproduces the figures of the card, and what a stock pipeline leaves out."""
    how = config.get(EVALUATED)
    seen = ""
    if how:
        scale = f"scaled to a long edge of {how['long_edge']} pixels" if how["long_edge"] else "at native resolution"
        seen = f" (windows of {how['crop_size']} pixels with at least a third of overlap, over images {scale})"
    return (
        f"`hf_dbp.predict` and `hf-dbp predict` treat images as the evaluation did{seen}, and reproduce its mean IoU "
        f"to all digits. A stock pipeline or forward pass sends the whole image through the model at once, at a size "
        f"it was not trained at, so its mean IoU differs."
    )


def training(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The card's settings and circumstances of the run, by name."""
    if not record:
        return []
    arguments, hardware = record["arguments"], record["hardware"]
    flags = natures(*pretraining.GROUPS, *segmentation.GROUPS, *classification.GROUPS, *detection.GROUPS)
    given = [(flag, arguments.get(name)) for name, flag in flags.items()]
    rows = [(flag.card, value) for flag, value in given if told(flag, value, record.get("method"))]
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * hardware["processes"]
    rows += [("images per optimizer step", batch), ("seed", record["seed"]), ("hardware", hardware_used(record))]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    if record.get("energy"):
        rows.append(("energy and CO2e", f"{energy_source(record)}; {record['energy']['scope']}"))
    return [*rows, ("versions", versions), ("commit of hf_dbp", record.get("commit") or "unknown")]


def told(flag: Nature, value: Any, method: str | None) -> bool:
    """Whether a setting gets a row in the card: not if it is off or not given, unless its nature says so."""
    counts = method == "dbp" or not flag.dbp
    return bool(flag.card) and counts and value not in (None, "none") and (value is not False or flag.card_if_off)


def limits(config: Mapping[str, Any], record: Mapping[str, Any], processor: Mapping[str, Any]) -> list[str]:
    """The card's sentences on what the model is not good for, or what was not measured."""
    kind = config["model_type"]
    channels = (config.get("backbone_config") or config)["num_channels"]
    chose = ", which also chose the checkpoint" if record.get("best_checkpoint") else ""
    scores = f"Scores are those of the validation images named above{chose}."
    headless = ["It has no head: fine-tune it, or train a classifier on its features. Neither was measured here."]
    found = {
        "vit": headless,
        "dinov2": [*headless, "It was not trained by DINOv2: it only has the same class, for heads that take one."],
        "upernet": [
            scores,
            "It is a stock UperNet over a plain ViT, without the relative position bias and LayerScale behind the "
            "published segmentation results of masked autoencoders.",
        ],
        "eomt": [
            scores,
            "Transformers' pipelines do not work with it: they do not cut images into crops of its size.",
        ],
        "beit": [
            scores,
            "It knows only the classes above: an image of anything else gets one of them, perhaps confidently.",
        ],
        "rf_detr": [
            scores,
            "Decoder and heads were trained on these images alone, without the detection pre-training of the published "
            "RF-DETR.",
        ],
        "dbp_vit_mae": ["It reconstructs masked patches. For features or fine-tuning, use the fused model."],
        "vit_mae": ["It reconstructs masked patches. For features, use its encoder."],
    }[kind]
    if record:
        found.append(f"It is a single run (seed {record['seed']}); the variation over seeds was not measured.")
        found.append("It saw images of one source only. Other cameras, scenes or preparations were not tried.")
    if channels != 3:
        found.append(
            f"It takes {channels} channels; transformers' pipelines turn every image into RGB and do not work with it."
        )
    elif processor and not stock_pipeline(config, processor):
        found.append(
            "It takes images with values other than 8 bits; transformers' pipelines turn every image into 8-bit RGB "
            "and do not work with it."
        )
    return found


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the card of a model's folder, there or, with record and pictures, in another folder."""
    parser = argparse.ArgumentParser(prog="hf_dbp.hub.model_card", description="Write the card of a trained model.")
    parser.add_argument("folder", type=Path, help="folder of a model: pre-trained, fused or fine-tuned")
    parser.add_argument("--hub_model_id", help="its name on the Hub (default: the folder)")
    parser.add_argument("--output_dir", type=Path, help="folder for a copy of the card, the record and the pictures")
    args = parser.parse_args(arguments)
    card = write_card(args.folder, args.hub_model_id)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name in (CARD, *RECORDS, *PICTURES):
            if (args.folder / name).is_file():
                card = Path(shutil.copy(args.folder / name, args.output_dir))
    print(card)


if __name__ == "__main__":
    main()
