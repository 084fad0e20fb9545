"""Fine-tune UperNet from a ViT, from flags to a folder: the main of `training_scripts/run_upernet.py`.

The flow: flags and recipe -> labelled images -> UperNet over the ViT -> trainer -> best checkpoint by mean IoU,
`eval.json`, pictures, card, and the Hub if asked for. Mistakes in flags or data end the command before training starts.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import (
    BeitImageProcessorPil,
    UperNetForSemanticSegmentation,
    set_seed,
)

from hf_dbp.data.values import processor_scaling
from hf_dbp.downstream.encoder import build_vit, check_channels, pixel_statistics
from hf_dbp.downstream.finetuning import finish, options_of, trained, trained_model
from hf_dbp.downstream.segmentation.arguments import GROUPS, DataArguments, FinetuningArguments, ModelArguments
from hf_dbp.downstream.segmentation.balance import balanced
from hf_dbp.downstream.segmentation.budget_choices import chosen
from hf_dbp.downstream.segmentation.data import TrainingCrops, load_labelled_images
from hf_dbp.downstream.segmentation.evaluation import evaluation_record, per_class, summary
from hf_dbp.downstream.segmentation.evaluation_settings import EVALUATED, Evaluated, autocast_of
from hf_dbp.downstream.segmentation.figures import plot_predictions, plot_worst
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.downstream.segmentation.upernet import build_upernet, load_upernet
from hf_dbp.errors import UserError, command
from hf_dbp.hub.publishing import claim_push
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, write_json
from hf_dbp.training.budget_plan import images_first, with_plan
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.processes import ending_processes

__all__ = ["DataArguments", "FinetuningArguments", "ModelArguments", "main", "run"]

logger = logging.getLogger(__name__)

EVAL_RESULTS = "eval_results.json"


def build_model(
    model_args: ModelArguments, data_args: DataArguments, names: dict[int, str], num_channels: int
) -> UperNetForSemanticSegmentation:
    """UperNet over the chosen ViT. UserError if the ViT does not fit the images."""
    vit = build_vit(model_args, data_args.crop_size, num_channels)
    return build_upernet(
        vit,
        names,
        ignore_index=data_args.ignore_index,
        hidden_size=model_args.head_size,
        auxiliary_channels=model_args.auxiliary_head_size,
    )


def image_processor(data: WholeImages) -> BeitImageProcessorPil:
    """The stock image processor of a UperNet, which scales and normalises as evaluation does, but does not pad to the
    crop.

    It scales only 8-bit images with 1 or 3 channels: it would take two channels for grey and alpha and blend them, and
    it refuses 16 bits.
    """
    dtype = data.images.readable(0)[0].dtype
    scaling = processor_scaling(dtype, data.images.value_range, data.mean, data.std) | {"do_resize": False}
    if data.long_edge is not None and len(data.mean) in (1, 3) and dtype == np.uint8:
        size = {"max_height": data.long_edge, "max_width": data.long_edge}
        scaling |= {"do_resize": True, "size": size, "resample": 3}
    return BeitImageProcessorPil(do_center_crop=False, **scaling)


def model_to_evaluate(model_args: ModelArguments, args: FinetuningArguments) -> ModelArguments:
    """For --do_eval alone: the UperNet of --model_name_or_path or, if that is an encoder, of the run in output_dir."""
    return trained_model(model_args, args, "UperNet", lambda config: config["model_type"] == "upernet")


def evaluate_alone(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> dict[str, Any]:
    """Evaluate a trained UperNet; write only `eval_results.json` and return its content."""
    model_args = model_to_evaluate(model_args, args)
    model_source, source = str(model_args.model_name_or_path), data_args.source(model_args.cache_dir, model_args.token)
    train_images, images = load_labelled_images(source)
    hub = model_args.hub_options
    model = load_upernet(model_source, source.class_names(), ignore_index=data_args.ignore_index, **hub)
    check_channels(model.config.backbone_config.num_channels, images.num_channels)
    data = WholeImages(images, data_args.scaled_long_edge, *pixel_statistics(model_args, train_images, images))
    trainer = SegmentationTrainer(model=model, args=args, crop_size=data_args.crop_size, eval_dataset=data)
    results = trainer.evaluate() | {"per_class": per_class(trainer), "model": model_source}
    if args.should_save:
        file = Path(args.output_dir) / EVAL_RESULTS
        write_json(file, results)
        print(f"mean IoU {results['eval_mean_iou']:.4f} of {model_source}; written to {file}")
    return results


def run(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> dict[str, Any]:
    """Fine-tune, evaluate and save; return the content of `output_dir/eval.json`.

    Without ``do_train``, only evaluate a trained UperNet and write `eval_results.json`.
    """
    if not (args.do_train or args.do_eval):
        raise UserError("nothing to do: give --do_train, --do_eval or both")
    if not args.do_train:
        return evaluate_alone(model_args, data_args, args)
    source = data_args.source(model_args.cache_dir, model_args.token)
    train_images, eval_images = load_labelled_images(source)
    set_seed(args.seed)
    model = build_model(model_args, data_args, source.class_names(), train_images.readable(0)[0].shape[2])
    mean, std = pixel_statistics(model_args, train_images, eval_images)
    augmentation = Augmentation(data_args.crop_size, data_args.scaled_long_edge, data_args.ignore_index)
    eval_data = WholeImages(eval_images, data_args.scaled_long_edge, mean, std)
    how = {name: getattr(args, name) for name in ("loss", "class_weights", "rare_crops", "rare_classes")}
    evaluated = Evaluated(
        data_args.crop_size, data_args.scaled_long_edge, args.per_device_eval_batch_size, autocast_of(args)
    )
    setattr(model.config, EVALUATED, evaluated.record())
    criterion, rare = balanced(model, train_images, **how)
    destination, arguments = claim_push(args, model_args.token), arguments_record(model_args, data_args, args)
    trainer = SegmentationTrainer(
        **options_of(args, arguments),
        model=model,
        crop_size=data_args.crop_size,
        criterion=criterion,
        train_dataset=TrainingCrops(train_images, augmentation, mean=mean, std=std, seed=args.seed, rare=rare),
        eval_dataset=eval_data,
        processing_class=image_processor(eval_data),
    )
    metrics, history = trained(trainer)
    record = evaluation_record(trainer, metrics, source, history)

    def plot(folder: Path) -> None:
        best = trainer.accelerator.unwrap_model(trainer.model).eval()
        plot_predictions(best, eval_data, folder / "predictions.png", crop_size=data_args.crop_size)
        plot_worst(best, eval_data, trainer.images, folder / "worst.png", crop_size=data_args.crop_size)

    finish(trainer, record, plot, summary, destination)
    return record


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and run. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    given = images_first(sys.argv[1:] if arguments is None else arguments, "--train_mask_dir")
    given = with_plan(given, GROUPS, chosen)
    parsed = parse_arguments(GROUPS, given, "Fine-tune UperNet from a ViT on labelled images.")
    with disk_errors(parsed[-1].output_dir), ending_processes():
        return run(*parsed)
