"""Pre-train a ViT by masked autoencoding, from flags to a folder: the main of `training_scripts/run_dbp_mae.py`.

The flow: flags and recipe -> images -> model -> trainer -> best checkpoint, `run.json`, pictures. Mistakes in flags or
data end the command before training starts.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import (
    PreTrainedModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.config_limits import check_fields
from hf_dbp.configuration_dbp_vit_mae import SIZES, DBPViTMAEConfig
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.data.feeding import step_images
from hf_dbp.data.images import ImageList, ImageSource, channel_statistics, load_images, share_value_range
from hf_dbp.data.masked import MaskedImages, interpolation_loss
from hf_dbp.data.resampling import augments_on_device
from hf_dbp.data.values import ValueRange, processor_scaling
from hf_dbp.errors import UserError, command
from hf_dbp.figures import plot_curves, plot_reconstructions
from hf_dbp.fusing import fuse_run, push_run
from hf_dbp.hub.model_card import write_card
from hf_dbp.hub.publishing import Destination, claim_push
from hf_dbp.hub.untrusted import (
    KINDS,
    check_memory,
    known_fields,
    load_weights,
    read_config,
    read_statistics,
    read_value_range,
)
from hf_dbp.hub.warm_start import fits, warm_start_
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, RectangularViTMAE, initialize_mae_
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import RECORD, RunRecord, arguments_record, write_json
from hf_dbp.stock_vit_mae import freeze_fixed_
from hf_dbp.training.accounting import asked_lines, asked_used
from hf_dbp.training.arguments import GROUPS, DataArguments, ModelArguments, PretrainingArguments
from hf_dbp.training.budget import BudgetCallback
from hf_dbp.training.budget_plan import Choice, choose, images_first, with_plan
from hf_dbp.training.checkpoints import model_folder
from hf_dbp.training.clocked import training_meter
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.duration import command_began, parse_duration
from hf_dbp.training.processes import alone, ending_processes
from hf_dbp.training.recommended import DESCRIPTION, warn_of_layers, warn_of_learning_rate, with_recommended
from hf_dbp.training.restoring import find_checkpoint
from hf_dbp.training.trainer import MAETrainer

__all__ = ["build_model", "main"]

logger = logging.getLogger(__name__)

EVAL_RESULTS = "eval_results.json"


def model_config(model_args: ModelArguments, num_channels: int) -> ViTMAEConfig:
    """The configuration that the flags describe. UserError for impossible sizes."""
    config_class = ViTMAEConfig if model_args.method == "stock" else DBPViTMAEConfig
    flags = {"mask_ratio": model_args.mask_ratio, "norm_pix_loss": model_args.norm_pix_loss}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if model_args.image_size is not None:
        given["image_size"] = model_args.image_size[0] if len(model_args.image_size) == 1 else model_args.image_size
    if model_args.patch_size is not None:
        given["patch_size"] = model_args.patch_size
    if config_class is DBPViTMAEConfig:
        given["decorrelated_layers"] = model_args.decorrelated_layers if model_args.method == "dbp" else "none"
        given["wide_blocks"] = model_args.wide_blocks if model_args.method == "dbp" else 1
        given["naive_decorrelation"] = model_args.naive_decorrelation
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        content = read_config(source, **model_args.hub_options)
        if content["model_type"] not in KINDS:
            raise UserError(f"{source} holds a {content['model_type']!r} model; give a ViT-MAE or a ViT")
        fields = known_fields(content, ViTMAEConfig)
        if not any(key.startswith("decoder_") for key in fields):  # a ViT: --model_size gives the decoder
            fields |= {key: value for key, value in SIZES[model_args.model_size].items() if key.startswith("decoder_")}
    else:
        fields = {**SIZES[model_args.model_size]}
    config = config_class(**(fields | {"num_channels": num_channels} | given))
    if model_args.config_overrides is not None:
        try:
            config.update_from_string(model_args.config_overrides)
        except ValueError as error:
            raise UserError(f"--config_overrides {model_args.config_overrides}: {error}") from error
    chosen = known_fields(config.to_dict(), config_class)
    check_fields(chosen)
    check_memory(chosen, "the configuration")
    return config


def build_model(model_args: ModelArguments, num_channels: int, seed: int) -> PreTrainedModel:
    """A model of the chosen method, from the checkpoint or drawn from ``seed``; all methods draw the same weights.

    Raises:
        UserError: image size and patch size do not fit together, or the checkpoint does not fit.
    """
    config = model_config(model_args, num_channels)
    model_class: type[PreTrainedModel] = DBPViTMAEForPreTraining
    if model_args.method == "stock":
        square = isinstance(config.image_size, int) or len(set(config.image_size)) == 1
        model_class = ViTMAEForPreTraining if square else RectangularViTMAE
    named, hub = model_args.model_name_or_path, model_args.hub_options
    if named is not None:
        warn_of_layers(named, read_config(named, **hub), config.to_dict())
    if named is not None and fits(named, config, **hub):
        model, fresh = load_weights(model_class, named, config=config, **hub)
        if fresh:
            logger.warning("%s lacks %s, which start from their initialisation", named, ", ".join(fresh))
        freeze_fixed_(model)
        return model
    model = model_class(config)
    set_seed(seed)
    initialize_mae_(model)
    if named is not None:
        warm_start_(model, named, **hub)
    return model


def image_processor(model: PreTrainedModel, views: MaskedImages) -> Any:
    """The stock image processor of a pre-trained model, which preprocesses images as evaluation does, except that it
    resizes instead of cropping.

    It resizes only 8-bit images with 1 or 3 channels: it would take two channels for grey and alpha and blend them, and
    it refuses 16 bits.
    """
    dtype, mean = views.images.readable(0).dtype, views.mean.tolist()
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessorPil(
        do_resize=len(mean) in (1, 3) and dtype == np.uint8,
        size={"height": height, "width": width},
        resample=3,
        **processor_scaling(dtype, views.images.value_range, mean, views.std.tolist()),
    )


def kept_value_range(model_args: ModelArguments) -> ValueRange | None:
    """The range of float values from the named image processor, else from the checkpoint."""
    if model_args.image_processor_name is not None:
        return read_value_range(model_args.image_processor_name, token=model_args.token)
    if model_args.model_name_or_path is None:
        return None
    return read_value_range(model_args.model_name_or_path, **model_args.hub_options)


def pixel_statistics(
    model_args: ModelArguments, images: ImageList, num_channels: int, kept_in: Path
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation per channel: from the named image processor, the checkpoint, or as asked."""
    if model_args.image_processor_name is not None:
        found = read_statistics(model_args.image_processor_name, token=model_args.token)
        if found is None:
            raise UserError(f"--image_processor_name {model_args.image_processor_name} has no image processor")
        return found
    if model_args.model_name_or_path is not None and model_args.image_statistics == "auto":
        found = read_statistics(model_args.model_name_or_path, **model_args.hub_options)
        if found is not None and len(found[0]) == num_channels:
            return found
    return channel_statistics(images, model_args.image_statistics, kept_in)


def prepare_data(
    data_args: DataArguments, model_args: ModelArguments, seed: int
) -> tuple[MaskedImages, MaskedImages, int]:
    """Training and validation views and their number of channels. UserError if something is wrong with them."""
    source = ImageSource(
        **dataclasses.asdict(data_args), cache_dir=model_args.cache_dir, token=model_args.token, seed=seed
    )
    config = model_config(model_args, data_args.num_channels or 3)  # only its sizes are used here
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
    if data_args.streaming and model_args.cache_dir is not None and data_args.cache_short_side < min(size):
        raise UserError(
            f"--cache_short_side {data_args.cache_short_side} is less than the model's input, {min(size)} pixels; "
            f"8/7 of that is usual: pass --cache_short_side {min(size) * 8 // 7}"
        )
    train_images, eval_images = load_images(source)
    num_channels = train_images.readable(0).shape[2]
    share_value_range(train_images, eval_images, kept=kept_value_range(model_args), folder=source.kept_in)
    mean, std = pixel_statistics(model_args, train_images, num_channels, source.kept_in)
    if len(mean) != num_channels:
        raise UserError(f"the image processor has statistics of {len(mean)} channels, the images have {num_channels}")
    views: dict[str, Any] = {"size": size, "patch_size": config.patch_size, "mean": mean, "std": std, "seed": seed}
    views |= {"native": model_args.native_tiles, "flip": model_args.flip}
    return MaskedImages(train_images, **views), MaskedImages(eval_images, **views), num_channels


def check_run(args: PretrainingArguments, train_data: MaskedImages) -> None:
    """Raise a UserError for flags of pre-training that would fail, or do nothing, once training has begun."""
    step = step_images(args)
    if args.do_train and args.dataloader_drop_last and len(train_data) < step:
        raise UserError(
            f"{len(train_data)} training images do not fill one batch of {step} (over all processes and accumulation); "
            "lower --per_device_train_batch_size or pass --dataloader_drop_last false"
        )


def new_record(
    model_args: ModelArguments, data_args: DataArguments, decorrelation_args: DecorrelationArguments,
    args: PretrainingArguments, train_data: MaskedImages, eval_data: MaskedImages,
) -> RunRecord:  # fmt: skip
    """The record of a pre-training run that has not begun."""
    record = RunRecord("pretraining", model_args.method, model_args.optimizer, args.seed)
    record.arguments = arguments_record(model_args, data_args, decorrelation_args, args)
    record.hardware["processes"] = args.world_size
    record.data = {
        "source": data_args.dataset_name or data_args.train_dir,
        "train_images": len(train_data),
        "validation_images": len(eval_data),
        "size": list(train_data.size),
        "channels": len(train_data.mean),
        "mean": train_data.mean.tolist(),
        "std": train_data.std.tolist(),
        "value_range": list(train_data.images.value_range),
        "augmented_on_device": train_data.on_device,
        "left_out": train_data.images.left_out.record(),
    }
    if train_data.images.subset:
        record.data["subset"] = train_data.images.subset
    return record


def model_to_evaluate(model_args: ModelArguments, args: PretrainingArguments) -> ModelArguments:
    """For --do_eval alone: the model of --model_name_or_path, else of the run in the output folder, else a new one."""
    if args.push_to_hub:
        raise UserError(
            "--push_to_hub pushes what --do_train trains; to push a finished run, use fuse_checkpoint.py --push_to_hub"
        )
    if model_args.model_name_or_path is not None:
        return model_args
    try:
        return dataclasses.replace(model_args, model_name_or_path=str(model_folder(args.output_dir)))
    except UserError:
        logger.warning("no --model_name_or_path and no run in %s: evaluating an untrained model", args.output_dir)
        return model_args


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    decorrelation_args: DecorrelationArguments,
    args: PretrainingArguments,
) -> RunRecord:
    """Pre-train, evaluate and save; return the record, which is also written to ``output_dir/run.json``. Without
    ``do_train``, only evaluate a model and write ``eval_results.json``.
    """
    if not (args.do_train or args.do_eval):
        raise UserError("nothing to do: give --do_train, --do_eval or both, or a --config that does")
    if not args.do_train:
        model_args = model_to_evaluate(model_args, args)
    set_seed(args.seed)
    train_data, eval_data, num_channels = prepare_data(data_args, model_args, args.seed)
    check_run(args, train_data)
    train_data.on_device = augments_on_device(model_args.augment_on_device, args, train_data.images)
    model = build_model(model_args, num_channels, args.seed)
    task = {
        name: getattr(model.config, name) for name in ("mask_ratio", "norm_pix_loss")
    }  # the checkpoint's by default
    model_args = dataclasses.replace(model_args, **task)
    record = new_record(model_args, data_args, decorrelation_args, args, train_data, eval_data)
    callback = None
    if any(True for _ in decorrelated_layers(model)):
        callback = DecorrelationCallback(decorrelation_args, seed=args.seed)
    destination = claim_push(args, model_args.token)
    meter = training_meter(args, args.country)
    record.energy = meter.description if meter is not None else {}
    budget = None if args.budget is None else BudgetCallback(parse_duration(args.budget), command_began())
    trainer = MAETrainer(
        callbacks=None
        if budget is None
        else [budget],  # before the clock, which stops for the evaluations and saves that it requests
        model=model,
        args=args,
        record=record,
        optimizer_name=model_args.optimizer,
        decorrelation=callback,
        meter=meter,
        max_skipped_steps=args.max_skipped_steps,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=image_processor(model, train_data),
    )
    if not args.do_train:
        evaluate_alone(trainer, model_args.model_name_or_path)
        return record
    with alone(args, args.output_dir):
        trainer.train(resume_from_checkpoint=find_checkpoint(args))
        if (args.do_eval or record.rows) and "eval_loss" not in trainer.model_figure():
            trainer.evaluate()
        if budget is not None:
            record.results["budget"] = budget.record()
        finish(trainer, record, eval_data, destination)
    return record


def evaluate_alone(trainer: MAETrainer, source: str | None) -> None:
    """Evaluate a masked autoencoder and write ``eval_results.json``, leaving the weights and the record of a run
    unchanged."""
    metrics = trainer.evaluate()
    if trainer.args.should_save:
        file, model = Path(trainer.args.output_dir) / EVAL_RESULTS, source or "an untrained model"
        write_json(file, metrics | {"model": model})
        print(f"validation loss {metrics['eval_loss']:.4f} of {model}; written to {file}")


def finish(trainer: MAETrainer, record: RunRecord, eval_data: MaskedImages, destination: Destination | None) -> None:
    """Save the model, the record, the pictures and the card, print where they are, and push the fused model."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    trainer.save_model()
    if not args.should_save:
        return
    trainer.save_state()
    if not model.config.norm_pix_loss:
        record.results["interpolation_loss"] = interpolation_loss(
            eval_data, model.config.patch_size, model.config.mask_ratio
        )
    folder = Path(args.output_dir)
    record.write(folder / RECORD)
    plot_reconstructions(model, eval_data, folder / "reconstruction.png")
    plot_curves(record.rows, folder / "curves.png", reference=record.results.get("interpolation_loss"))
    write_card(folder)
    record.results["steps"] = {"asked": trainer.state.max_steps, "taken": trainer.state.global_step}
    record.asked_used = asked_used(trainer.asked, record.arguments, record.data, record.results, record.best)
    record.results["finished"] = True  # last, because a finished run is not run again
    record.write(folder / RECORD)
    print(summary(record, folder))
    if destination is not None:
        fuse_run(folder, folder / "fused", eval_data, name=destination.repo_id)
        push_run(folder, folder / "fused", destination, unfused=args.push_unfused)


def summary(record: RunRecord, folder: Path) -> str:
    """The results of pre-training and where they are, to print at its end."""
    lines = [f"\n{record.method} with {record.optimizer}, seed {record.seed}: {folder}"]
    model = record.results["model"]
    if "eval_loss" in model:
        lines.append(
            f"  validation loss       {model['eval_loss']:.4f} of the model in that folder, from step {model['step']}"
        )
    if record.best is not None and record.best["step"] != model["step"]:
        lines.append(f"  lowest seen           {record.best['eval_loss']:.4f} at step {record.best['step']}, not kept")
    if "interpolation_loss" in record.results:
        lines.append(f"  interpolated means    {record.results['interpolation_loss']:.4f} (the simplest baseline)")
    if "train_seconds" in record.results:
        lines.append(f"  training time         {record.results['train_seconds']:.1f} s")
    if "kwh" in record.results:
        lines.append(
            f"  energy of training    {record.results['kwh']:.6f} kWh, {record.results['co2e_kg']:.6f} kg CO2e "
            f"({record.energy['carbon_intensity_g_per_kwh']:g} g/kWh, {record.energy['country']}; "
            f"processor: {record.energy['cpu']})"
        )
    lines.append("  model, image processor, card, run.json, curves.png, reconstruction.png are in that folder")
    if record.method == "dbp":
        run, fused = (shlex.quote(f"{folder}{ending}") for ending in ("", "-fused"))
        lines.append(f"  next: hf-dbp fuse {run} --output_dir {fused}")
    return "\n".join([*lines, *asked_lines(record.asked_used)])


def chosen(parsed: Sequence[Any], seconds: float, flags: Collection[str]) -> list[Choice]:
    """What --budget chooses for these arguments."""
    model_args, data_args, *_ = parsed
    source = ImageSource(**dataclasses.asdict(data_args), cache_dir=model_args.cache_dir, token=model_args.token)
    return choose(load_images(source)[0], seconds)


@command
def main(arguments: Sequence[str] | None = None) -> RunRecord | None:
    """Parse flags and recipe, and run. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    given = images_first(sys.argv[1:] if arguments is None else arguments)
    if sys.argv[0] == "hf-dbp pretrain":
        given = with_recommended(given)
    given = with_plan(given, GROUPS, chosen)
    parsed = parse_arguments(GROUPS, given, DESCRIPTION)
    warn_of_learning_rate(given, parsed[-1].do_train)
    with disk_errors(parsed[-1].output_dir), ending_processes():
        return run(*parsed)


if __name__ == "__main__":
    main()
