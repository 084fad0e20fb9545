"""The metadata block of a model card (YAML): results for the Hub, emissions, tags; and the figures of a record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_dbp.downstream.segmentation import arguments as segmentation

__all__ = [
    "RESULTS",
    "energy_source",
    "figures",
    "finds_masks",
    "hardware_used",
    "metadata",
    "shown",
    "stock_pipeline",
]

RESULTS = {  # name in the record -> name in the card, and metric on the Hub
    "eval_loss": ("mean squared error on the masked patches of the validation images", "mse"),
    "lowest_loss": ("the lowest seen in training, for weights that were not kept", None),
    "interpolation_loss": ("the same for interpolated means of the visible patches, the simplest baseline", None),
    "mean_iou": ("mean IoU over all pixels of the validation images", "mean_iou"),
    "mean_accuracy": ("mean accuracy of the classes", "mean_accuracy"),
    "overall_accuracy": ("accuracy of all pixels", "accuracy"),
    "accuracy": ("accuracy on the validation images (top-1)", "accuracy"),
    "top5_accuracy": ("share of the images whose class is among the five most probable", None),
    "balanced_accuracy": ("mean recall of the classes", None),
    "expected_calibration_error": ("expected calibration error, over 15 bins", None),
    "majority_class_accuracy": ("accuracy of always predicting the most common class, the simplest baseline", None),
    "map": ("mAP of boxes: mean average precision over overlaps of 0.50 to 0.95", "mean_average_precision"),
    "map_50": ("AP50 of boxes, at an overlap of 0.50", None),
    "map_75": ("AP75 of boxes, at an overlap of 0.75", None),
    "map_small": ("mAP of boxes, small objects (below 32 x 32 pixels)", None),
    "map_medium": ("mAP of boxes, medium objects", None),
    "map_large": ("mAP of boxes, large objects (above 96 x 96 pixels)", None),
    "mask_map": ("mAP of masks", None),
    "mask_map_50": ("AP50 of masks", None),
    "mask_map_75": ("AP75 of masks", None),
    "loss": ("validation loss", None),
    "majority_class_mean_iou": ("mean IoU of predicting the most common class everywhere, the simplest baseline", None),
    "train_seconds": ("training time in seconds, validation and checkpoints excluded", None),
    "kwh": ("energy of training in kWh", None),
    "co2e_kg": ("CO2-equivalent of training in kg", None),
    "fusion_largest_difference": ("largest difference between fused and unfused outputs", None),
}


def finds_masks(config: Mapping[str, Any]) -> bool:
    """Whether the model of a configuration finds objects with their masks."""
    return "RfDetrForInstanceSegmentation" in (config.get("architectures") or ())


def stock_pipeline(config: Mapping[str, Any], processor: Mapping[str, Any]) -> bool:
    """Whether a stock pipeline works: it turns every image into 8-bit RGB, so the model must take that.

    Args:
        config: configuration of the model.
        processor: content of its `preprocessor_config.json`; empty if there is none.
    """
    channels = (config.get("backbone_config") or config)["num_channels"]
    eight_bits = math.isclose(processor.get("rescale_factor", 0), 1 / 255) and "value_range" not in processor
    return bool(channels == 3 and processor.get("do_rescale", True) and eight_bits)


def metadata(
    config: Mapping[str, Any], record: Mapping[str, Any], processor: Mapping[str, Any], title: str
) -> ModelCardData:
    """The card's YAML block: results as ``model-index``, emissions, tags."""
    kind = config["model_type"]
    purposes = dict.fromkeys(segmentation.HEADS, "image-segmentation")
    purposes |= {"beit": "image-classification", "rf_detr": "object-detection"}
    if finds_masks(config):
        purposes["rf_detr"] = "image-segmentation"
    tuned = kind in purposes
    fields: dict[str, Any] = {"library_name": "hf_dbp" if kind == "dbp_vit_mae" else "transformers"}
    if kind in ("vit", "dinov2", *purposes) and kind != "eomt" and stock_pipeline(config, processor):
        fields["pipeline_tag"] = purposes.get(kind, "image-feature-extraction")
    tags = dict.fromkeys(segmentation.HEADS, "semantic-segmentation") | {"beit": "image-classification"}
    tags["rf_detr"] = "instance-segmentation" if finds_masks(config) else "object-detection"
    fields["tags"] = ["vision", tags.get(kind, "masked-auto-encoding")]
    if record.get("method") == "dbp":
        fields["tags"].append("decorrelated-backpropagation")
    source = record.get("data", {}).get("source")
    if hub_id(source):
        fields["datasets"] = [source]
    start = record.get("arguments", {}).get("model_name_or_path")
    if hub_id(start):
        fields["base_model"] = start
    if record and (results := eval_results(record)):
        fields |= {"model_name": title, "eval_results": results}
    if (kilograms := figures(record).get("co2e_kg")) is not None:
        fields["co2_eq_emissions"] = {
            "emissions": kilograms * 1000,  # the Hub counts grams
            "source": energy_source(record),
            "training_type": "fine-tuning" if tuned else "pre-training",
            "geographical_location": record["energy"]["country"],
            "hardware_used": hardware_used(record),
        }
    return ModelCardData(**fields)


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The measured figures for which the Hub has a metric."""
    source = record["data"]["source"]
    tasks = {
        "segmentation": "image-segmentation", "classification": "image-classification", "detection": "object-detection",
    }  # fmt: skip
    task = tasks.get(record["task"], "masked-auto-encoding")
    return [
        EvalResult(
            task_type=task,
            dataset_type=source if hub_id(source) else shown(source),
            dataset_name=shown(source),
            dataset_split="validation",
            metric_type=metric,
            metric_name=label,
            metric_value=figures(record)[key],
        )
        for key, (label, metric) in RESULTS.items()
        if metric is not None and key in figures(record)
    ]


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The measured figures of a record, for the card, by name, for the whole run and for the model in its folder.

    A record of 0.1.0 does not say which weights these are; then the loss is that of its best evaluation.
    """
    best, results = record.get("best", {}), record.get("results", {})
    model = results.get("model", best)
    found = {**record, "eval_loss": model.get("eval_loss"), **results}
    if best.get("step") != model.get("step"):
        found["lowest_loss"] = best.get("eval_loss")
    return {key: found[key] for key in RESULTS if isinstance(found.get(key), float) and math.isfinite(found[key])}


def hardware_used(record: Mapping[str, Any]) -> str:
    """The GPUs, else the processor, for the card."""
    hardware = record["hardware"]
    if "gpu" in hardware:
        return f"{hardware['processes']} x {hardware['gpu']}"
    return f"{hardware['processor']}, {hardware['cores']} cores"


def energy_source(record: Mapping[str, Any]) -> str:
    """How energy and CO2e were determined."""
    energy = record["energy"]
    parts = f"processor: {energy['cpu']}; memory: {energy['ram']}; GPU: {energy['gpu']}"
    intensity = f"{energy['carbon_intensity_g_per_kwh']:g} g/kWh, {energy['country']}"
    return f"codecarbon {energy['codecarbon']} ({parts}) at {intensity}"


def hub_id(name: str | None) -> bool:
    """Whether a name is ``user/name`` on the Hub and not a local folder, even one that no longer exists."""
    return bool(name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(str(name)).parent.exists()


def shown(source: str | None) -> str:
    """A public name: a Hub id or built-in set unchanged, the last part of a folder."""
    name = str(source)
    return name if hub_id(name) else Path(name).name
