"""Fine-tune a detector, from flags to a folder: the main of `training_scripts/run_detection.py`.

    hf-dbp detect IMAGES LABELS --model_name_or_path ENCODER --output_dir OUT --do_train

The flow: flags and recipe -> images with objects -> stock RF-DETR over the ViT -> trainer -> best checkpoint by mean
average precision, `eval.json`, pictures, card, and the Hub if asked for. Mistakes in flags, labels or images end the
command before training starts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel, set_seed

from hf_dbp.downstream.beit import sides
from hf_dbp.downstream.detection.arguments import GROUPS, DataArguments, DetectionArguments, ModelArguments
from hf_dbp.downstream.detection.budget_choices import chosen
from hf_dbp.downstream.detection.data import ObjectImages, load_objects
from hf_dbp.downstream.detection.evaluation import class_rows, evaluation_record, shown, summary
from hf_dbp.downstream.detection.figures import plot_detections
from hf_dbp.downstream.detection.model import build_detector, is_detector, load_detector
from hf_dbp.downstream.detection.runs import tools
from hf_dbp.downstream.detection.trainer import DetectionTrainer
from hf_dbp.downstream.detection.views import TrainingViews, WholeImages, image_processor
from hf_dbp.downstream.encoder import build_vit, check_channels, pixel_statistics
from hf_dbp.downstream.finetuning import class_ids, finish, options_of, trained, trained_model
from hf_dbp.downstream.networks import channels_of, processor_size
from hf_dbp.errors import UserError, command
from hf_dbp.hub.publishing import claim_push
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, write_json
from hf_dbp.training.budget_plan import images_first, with_plan
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.processes import alone, ending_processes

__all__ = ["main", "run"]

logger = logging.getLogger(__name__)

EVAL_RESULTS = "eval_results.json"
DEFAULT_SIZE = 448


def build_model(
    model_args: ModelArguments, names: Sequence[str], num_channels: int
) -> tuple[PreTrainedModel, tuple[int, int]]:
    """A detector over the chosen ViT, and height and width of its views. UserError if the ViT does not fit the
    images."""
    given = model_args.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    vit = build_vit(model_args, max(given), num_channels)
    size = model_args.size
    if size is None:
        height, width = sides(vit.config.image_size)
        size = given if model_args.model_name_or_path is None else (2 * height, 2 * width)
    how = {
        name: getattr(model_args, name)
        for name in ("instances", "num_queries", "query_groups", "decoder_layers", "decoder_width", "num_windows")
    }
    return build_detector(vit, names, image_size=size, **how), size


def model_to_evaluate(model_args: ModelArguments, args: DetectionArguments) -> ModelArguments:
    """For --do_eval alone: the detector of --model_name_or_path or, if that is an encoder, of the run in output_dir."""
    return trained_model(model_args, args, "detector", is_detector)


def evaluate_alone(model_args: ModelArguments, data_args: DataArguments, args: DetectionArguments) -> dict[str, Any]:
    """Evaluate a trained detector; write only `eval_results.json` and return its content."""
    model_args = model_to_evaluate(model_args, args)
    model_source = str(model_args.model_name_or_path)
    model, content = load_detector(model_source, **model_args.hub_options)
    instances = hasattr(model, "segmentation_head")
    train, validation = load_objects(data_args.source(model_args.cache_dir, model_args.token, instances))
    check_channels(channels_of(content), validation.images.num_channels)
    named(model, model_source, validation)
    statistics = pixel_statistics(model_args, train.images, validation.images)
    data = WholeImages(validation, model_args.size or processor_size(model_source), *statistics)
    trainer = DetectionTrainer(model=model, args=args, eval_dataset=data)
    results: dict[str, Any] = trainer.evaluate() | {"model": model_source, "per_class": class_rows(trainer)}
    if args.should_save:
        file = Path(args.output_dir) / EVAL_RESULTS
        write_json(file, results)
        print(f"mAP {shown(results['eval_map'])} of {model_source}; written to {file}")
    return results


def named(model: PreTrainedModel, source: str, data: ObjectImages) -> None:
    """Give objects the model's ids for their classes. UserError for a class that the model lacks."""
    present = [name for name, count in zip(data.names, data.counts_K, strict=True) if count]
    ids = class_ids(model, source, present)
    own = np.array([ids.get(name, 0) for name in data.names], np.int64)
    data.objects = [None if one is None else replace(one, classes_N=own[one.classes_N]) for one in data.objects]
    data.names = list(ids)


def run(model_args: ModelArguments, data_args: DataArguments, args: DetectionArguments) -> dict[str, Any]:
    """Fine-tune, evaluate and save; return the content of `output_dir/eval.json`.

    Without ``do_train``, only evaluate a trained detector and write `eval_results.json`.
    """
    if not (args.do_train or args.do_eval):
        raise UserError("nothing to do: give --do_train, --do_eval or both")
    if str(args.metric_for_best_model).startswith("eval_mask") and not model_args.instances:
        raise UserError("--metric_for_best_model of masks needs --instances")
    tools("cocoeval")
    if not args.do_train:
        return evaluate_alone(model_args, data_args, args)
    source = data_args.source(model_args.cache_dir, model_args.token, model_args.instances)
    train, validation = load_objects(source)
    set_seed(args.seed)
    model, size = build_model(model_args, train.names, train.images.readable(0).shape[2])
    for data in (train, validation):
        for line in data.report(size):
            logger.warning("%s: %s", data.images.name, line)
    mean, std = pixel_statistics(model_args, train.images, validation.images)
    train_data = TrainingViews(train, size, mean=mean, std=std, seed=args.seed, scale=args.crop_scale, flip=args.flip)
    eval_data = WholeImages(validation, size, mean, std)
    destination, arguments = claim_push(args, model_args.token), arguments_record(model_args, data_args, args)
    trainer = DetectionTrainer(
        **options_of(args, arguments),
        model=model,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=image_processor(eval_data),
    )

    def plot(folder: Path) -> None:
        plot_detections(eval_data, trainer.found, dict(enumerate(train.names)), folder / "predictions.png")

    with alone(args, args.output_dir):
        metrics, history = trained(trainer)
        record = evaluation_record(trainer, metrics, source, history)
        finish(trainer, record, plot, summary, destination, loss="loss of RF-DETR")
    return record


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and run. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    given = images_first(sys.argv[1:] if arguments is None else arguments, "--train_mask_dir")
    given = with_plan(given, GROUPS, chosen)
    parsed = parse_arguments(GROUPS, given, "Fine-tune an object detector from a ViT on labelled images.")
    with disk_errors(parsed[-1].output_dir), ending_processes():
        return run(*parsed)
