"""Fine-tune a classifier, from flags to a folder: the main of `training_scripts/run_classification.py`.

    hf-dbp classify IMAGES --model_name_or_path ENCODER --output_dir OUT --do_train

The flow: flags and recipe -> images with classes -> stock classifier over the ViT -> trainer -> best checkpoint by
accuracy, `eval.json`, pictures, card, and the Hub if asked for. Defaults are He et al.'s for ViT-Base (2022, table 9).
Mistakes in flags, labels or images end the command before training starts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import BeitForImageClassification, PreTrainedModel, set_seed

from hf_dbp.data.classes import ClassifiedImages, load_classified
from hf_dbp.downstream.beit import sides
from hf_dbp.downstream.class_weights import class_weights
from hf_dbp.downstream.classification.arguments import GROUPS, ClassificationArguments, DataArguments, ModelArguments
from hf_dbp.downstream.classification.augmentation import Mixing
from hf_dbp.downstream.classification.evaluation import evaluation_record, summary
from hf_dbp.downstream.classification.figures import plot_calibration, plot_confusion, plot_mistakes
from hf_dbp.downstream.classification.metrics import class_figures
from hf_dbp.downstream.classification.model import build_classifier, load_classifier
from hf_dbp.downstream.classification.trainer import ClassificationTrainer
from hf_dbp.downstream.classification.views import Augmentation, CentralViews, TrainingViews, image_processor
from hf_dbp.downstream.encoder import build_vit, check_channels, pixel_statistics
from hf_dbp.downstream.finetuning import class_ids, finish, options_of, trained, trained_model
from hf_dbp.downstream.networks import channels_of
from hf_dbp.errors import UserError, command
from hf_dbp.hub.publishing import claim_push
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, write_json
from hf_dbp.training.budget_plan import images_first
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.processes import alone, ending_processes

__all__ = ["main", "run"]

logger = logging.getLogger(__name__)

EVAL_RESULTS = "eval_results.json"


def build_model(model_args: ModelArguments, names: Sequence[str], num_channels: int) -> BeitForImageClassification:
    """A classifier over the chosen ViT. UserError if the ViT does not fit the images."""
    vit = build_vit(model_args, max(model_args.size or (224,)), num_channels)
    return build_classifier(vit, names, drop_path=model_args.drop_path, image_size=view_size(model_args, vit.config))


def view_size(model_args: ModelArguments, config: Any) -> tuple[int, int]:
    """Height and width of a classifier's view."""
    return model_args.size or sides(config.image_size)


def model_to_evaluate(model_args: ModelArguments, args: ClassificationArguments) -> ModelArguments:
    """For --do_eval alone: the classifier of --model_name_or_path, else that of the run in output_dir."""

    def is_one(config: dict[str, Any]) -> bool:
        return any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or ())

    return trained_model(model_args, args, "classifier", is_one)


def evaluate_alone(
    model_args: ModelArguments, data_args: DataArguments, args: ClassificationArguments
) -> dict[str, Any]:
    """Evaluate a trained classifier; write only `eval_results.json` and return its content."""
    model_args = model_to_evaluate(model_args, args)
    model_source, source = str(model_args.model_name_or_path), data_args.source(model_args.cache_dir, model_args.token)
    train, validation = load_classified(source)
    model, content = load_classifier(model_source, **model_args.hub_options)
    check_channels(channels_of(content), validation.images.num_channels)
    named(model, model_source, validation)
    statistics = pixel_statistics(model_args, train.images, validation.images)
    data = CentralViews(validation, view_size(model_args, model.config), *statistics)
    trainer = ClassificationTrainer(model=model, args=args, eval_dataset=data)
    results: dict[str, Any] = trainer.evaluate() | {"model": model_source}
    results["per_class"] = class_figures(trainer.tally.confusion_KK, model.config.id2label)
    if args.should_save:
        file = Path(args.output_dir) / EVAL_RESULTS
        write_json(file, results)
        print(f"accuracy {results['eval_accuracy']:.4f} of {model_source}; written to {file}")
    return results


def named(model: PreTrainedModel, source: str, data: ClassifiedImages) -> None:
    """Give images the model's ids for their classes. UserError for a class that the model lacks."""
    present = [data.names[k] for k in sorted(set(data.labels_N.tolist()))]
    ids = class_ids(model, source, present)
    own = {k: ids.get(name, -1) for k, name in enumerate(data.names)}
    data.labels_N[:] = [own[int(k)] for k in data.labels_N]
    data.names = list(ids)


def run(model_args: ModelArguments, data_args: DataArguments, args: ClassificationArguments) -> dict[str, Any]:
    """Fine-tune, evaluate and save; return the content of `output_dir/eval.json`.

    Without ``do_train``, only evaluate a trained classifier and write `eval_results.json`.
    """
    if not (args.do_train or args.do_eval):
        raise UserError("nothing to do: give --do_train, --do_eval or both")
    if not args.do_train:
        return evaluate_alone(model_args, data_args, args)
    source = data_args.source(model_args.cache_dir, model_args.token)
    train, validation = load_classified(source)
    set_seed(args.seed)
    model = build_model(model_args, train.names, train.images.readable(0).shape[2])
    mean, std = pixel_statistics(model_args, train.images, validation.images)
    size = view_size(model_args, model.config)
    augmentation = Augmentation(
        (args.crop_scale, 1.0), args.flip, args.randaugment_operations, args.randaugment_magnitude, args.random_erasing
    )
    how: dict[str, Any] = {"mean": mean, "std": std, "seed": args.seed, "balanced": args.balanced_sampling}
    train_data = TrainingViews(train, size, augmentation, **how)
    eval_data = CentralViews(validation, size, mean, std)
    if args.randaugment_operations:
        for name, reason in train_data.left_out.items():
            logger.warning("RandAugment without %s: %s", name, reason)
    weights = class_weights(train.counts_K, args.class_weights)
    mixing = Mixing(len(train.names), args.mixup, args.cutmix, args.label_smoothing_factor, weights)
    destination, arguments = claim_push(args, model_args.token), arguments_record(model_args, data_args, args)
    trainer = ClassificationTrainer(
        **options_of(args, arguments),
        model=model,
        mixing=mixing,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=image_processor(eval_data),
    )

    def plot(folder: Path) -> None:
        plot_confusion(trainer.tally.confusion_KK, train.names, folder / "confusion.png")
        plot_calibration(trainer.tally.bins_3B, folder / "calibration.png")
        plot_mistakes(trainer.mistakes, eval_data, folder / "mistakes.png")

    with alone(args, args.output_dir):
        metrics, history = trained(trainer)
        record = evaluation_record(trainer, metrics, source, history)
        finish(trainer, record, plot, summary, destination)
    return record


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and run. User mistakes end with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    given = images_first(sys.argv[1:] if arguments is None else arguments)
    parsed = parse_arguments(GROUPS, given, "Fine-tune an image classifier from a ViT.")
    with disk_errors(parsed[-1].output_dir), ending_processes():
        return run(*parsed)
