"""Fine-tune UperNet or EoMT from a ViT, from flags to a folder: the main of `training_scripts/run_upernet.py`.

The flow: flags and recipe -> labelled images -> UperNet or EoMT over the ViT -> trainer -> best checkpoint by mean IoU,
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
    EomtImageProcessorPil,
    PreTrainedModel,
    set_seed,
)

from hf_dbp.data.values import processor_scaling
from hf_dbp.downstream.encoder import build_vit, check_channels, pixel_statistics
from hf_dbp.downstream.finetuning import finish, options_of, trained, trained_model
from hf_dbp.downstream.networks import channels_of
from hf_dbp.downstream.segmentation.arguments import GROUPS, HEADS, DataArguments, FinetuningArguments, ModelArguments
from hf_dbp.downstream.segmentation.balance import balanced
from hf_dbp.downstream.segmentation.budget_choices import chosen
from hf_dbp.downstream.segmentation.data import TrainingCrops, load_labelled_images
from hf_dbp.downstream.segmentation.evaluation import evaluation_record, per_class, summary
from hf_dbp.downstream.segmentation.evaluation_settings import EVALUATED, Evaluated, autocast_of
from hf_dbp.downstream.segmentation.figures import plot_predictions, plot_worst
from hf_dbp.downstream.segmentation.heads import build_head, load_head, segmenter
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.errors import UserError, command
from hf_dbp.hub.publishing import claim_push
from hf_dbp.hub.untrusted import read_config
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, write_json
from hf_dbp.training.budget_plan import images_first, with_plan
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.processes import alone, ending_processes

__all__ = ["DataArguments", "FinetuningArguments", "ModelArguments", "main", "run"]

logger = logging.getLogger(__name__)

EVAL_RESULTS = "eval_results.json"


def build_model(
    model_args: ModelArguments, data_args: DataArguments, names: dict[int, str], num_channels: int
) -> PreTrainedModel:
    """The chosen head over the chosen ViT. UserError if the ViT does not fit the images."""
    vit = build_vit(model_args, data_args.crop_size, num_channels)
    return build_head(vit, names, model_args, crop_size=data_args.crop_size, ignore_index=data_args.ignore_index)


def image_processor(data: WholeImages, eomt_crop: int | None = None) -> BeitImageProcessorPil | EomtImageProcessorPil:
    """The stock image processor of a model, which scales and normalises as evaluation does, but does not pad to the
    crop; for an EoMT, its own, with the side of its crop.

    It scales only 8-bit images with 1 or 3 channels: it would take two channels for grey and alpha and blend them, and
    it refuses 16 bits.
    """
    dtype = data.images.readable(0)[0].dtype
    scaling = processor_scaling(dtype, data.images.value_range, data.mean, data.std) | {"do_resize": False}
    edge, eomt = data.long_edge, eomt_crop is not None
    if edge is not None and len(data.mean) in (1, 3) and dtype == np.uint8:
        scaling |= {"do_resize": True, "size": {"max_height": edge, "max_width": edge}, "resample": 3}
    elif eomt:
        scaling |= {"size": {"shortest_edge": eomt_crop, "longest_edge": eomt_crop}}  # to which it scales masks
    return EomtImageProcessorPil(**scaling) if eomt else BeitImageProcessorPil(do_center_crop=False, **scaling)


def model_to_evaluate(model_args: ModelArguments, args: FinetuningArguments) -> ModelArguments:
    """For --do_eval alone: the model of --model_name_or_path or, if that is an encoder, of the run in output_dir."""
    return trained_model(model_args, args, "segmentation model", lambda config: config["model_type"] in HEADS)


def evaluate_alone(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> dict[str, Any]:
    """Evaluate a trained model; write only `eval_results.json` and return its content."""
    model_args = model_to_evaluate(model_args, args)
    model_source, source = str(model_args.model_name_or_path), data_args.source(model_args.cache_dir, model_args.token)
    train_images, images = load_labelled_images(source)
    hub = model_args.hub_options
    content = read_config(model_source, **hub)
    names, ignored = source.class_names(), data_args.ignore_index
    model = load_head(content["model_type"], model_source, names, ignore_index=ignored, **hub)
    check_channels(channels_of(content), images.num_channels)
    data = WholeImages(images, data_args.scaled_long_edge, *pixel_statistics(model_args, train_images, images))
    trainer = SegmentationTrainer(model=model, args=args, crop_size=data_args.crop_size, eval_dataset=data)
    results = trainer.evaluate() | {"per_class": per_class(trainer), "model": model_source}
    if args.should_save:
        file = Path(args.output_dir) / EVAL_RESULTS
        write_json(file, results)
        print(f"mean IoU {results['eval_mean_iou']:.4f} of {model_source}; written to {file}")
    return results


def check_own_loss(args: FinetuningArguments) -> None:
    """Raise a UserError for a flag of another loss than EoMT's own."""
    for name, plain in {"loss": "ce", "class_weights": "none"}.items():
        if getattr(args, name) != plain:
            raise UserError(
                f"--{name} {getattr(args, name)} is for --head upernet: EoMT has a loss of its own; leave it out, or "
                "take --rare_crops for rare classes"
            )


def run(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> dict[str, Any]:
    """Fine-tune, evaluate and save; return the content of `output_dir/eval.json`.

    Without ``do_train``, only evaluate a trained model and write `eval_results.json`.
    """
    if not (args.do_train or args.do_eval):
        raise UserError("nothing to do: give --do_train, --do_eval or both")
    if not args.do_train:
        return evaluate_alone(model_args, data_args, args)
    if model_args.head == "eomt":
        check_own_loss(args)
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
        processing_class=image_processor(eval_data, data_args.crop_size if model_args.head == "eomt" else None),
    )

    def plot(folder: Path) -> None:
        best = segmenter(trainer.accelerator.unwrap_model(trainer.model).eval())
        plot_predictions(best, eval_data, folder / "predictions.png", crop_size=data_args.crop_size)
        plot_worst(best, eval_data, trainer.images, folder / "worst.png", crop_size=data_args.crop_size)

    with alone(args, args.output_dir):
        metrics, history = trained(trainer)
        record = evaluation_record(trainer, metrics, source, history)
        finish(trainer, record, plot, summary, destination)
    return record


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and run. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    given = images_first(sys.argv[1:] if arguments is None else arguments, "--train_mask_dir")
    given = with_plan(given, GROUPS, chosen)
    parsed = parse_arguments(GROUPS, given, "Fine-tune UperNet or EoMT from a ViT on labelled images.")
    with disk_errors(parsed[-1].output_dir), ending_processes():
        return run(*parsed)
