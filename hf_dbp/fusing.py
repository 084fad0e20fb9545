"""Turn a pre-training run into a stock ViT or DINOv2: the main of `training_scripts/fuse_checkpoint.py`.

W R replaces (W, R) in every layer (paper section 2.2), the decoder is dropped, and the result is compared with the
unfused encoder on real images before anything is written. The folder also gets image processor, record, curves,
reconstructions and card: everything that is pushed to the Hub.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Model, ViTImageProcessorPil, ViTMAEForPreTraining, ViTModel

from hf_dbp.data.images import ImageSource, load_images, share_value_range
from hf_dbp.data.masked import MaskedImages
from hf_dbp.downstream.bridge import extract_dinov2
from hf_dbp.errors import UserError, command
from hf_dbp.figures import plot_curves, plot_reconstructions
from hf_dbp.hub.model_card import write_card
from hf_dbp.hub.publishing import Destination
from hf_dbp.hub.untrusted import load_model, read_config, read_statistics, read_value_range
from hf_dbp.modeling_dbp_vit_mae import UNFUSED, extract_vit
from hf_dbp.records import RECORD, RunRecord
from hf_dbp.training.checkpoints import model_folder
from hf_dbp.training.saving import UNFINISHED, clear, move_files

__all__ = ["check_views", "fuse_run", "largest_difference", "main", "push_run"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def largest_difference(
    mae: ViTMAEForPreTraining, vit: ViTModel | Dinov2Model, pixels_BCHW: Tensor
) -> tuple[float, float]:
    """Compare the unfused encoder, with all patches visible, with the fused ViT on images (B, C, H, W).

    Returns:
        The largest absolute difference of their last hidden states (B, 1 + T, D), and the largest absolute state.
    """
    encoder, vit = mae.vit.eval(), vit.eval()
    ratio, encoder.config.mask_ratio = encoder.config.mask_ratio, 0.0
    in_order = torch.arange(encoder.embeddings.patch_embeddings.num_patches, device=pixels_BCHW.device)
    try:
        unfused = encoder(pixels_BCHW, noise=in_order.expand(len(pixels_BCHW), -1)).last_hidden_state
    finally:
        encoder.config.mask_ratio = ratio
    fused = vit(pixels_BCHW).last_hidden_state
    return float((fused - unfused).abs().max()), float(unfused.abs().max())


def check_views(run: Path, image_dir: str | None = None, count: int = 8) -> MaskedImages:
    """Up to ``count`` validation views of the run's own data, or of a folder of images.

    Raises:
        UserError: there is neither a folder nor a run record that names the data, or the data is gone.
    """
    folder = model_folder(run)
    config = read_config(folder)
    statistics = read_statistics(folder)
    if statistics is None:
        raise UserError(f"{folder} has no preprocessor_config.json, which states mean and std")
    channels, size = config.get("num_channels", 3), config.get("image_size", 224)
    record = RunRecord.read(folder / RECORD) if (folder / RECORD).is_file() else None
    seed = 0
    if image_dir is not None:
        source = ImageSource(train_dir=image_dir, num_channels=channels, max_eval_samples=count)
    elif record is not None:
        seed = record.seed
        names = ImageSource.__dataclass_fields__.keys() & record.arguments.keys() - {"token", "seed"}
        given = {name: record.arguments[name] for name in names}
        given |= {"max_eval_samples": count, "train_fraction": 1.0}  # no training image is read
        given |= {"cache_dir": None} if given.get("streaming") else {}
        source = ImageSource(**given, seed=seed)
    else:
        raise UserError(f"{folder} has no {RECORD}, which names the data of the run; pass --image_dir FOLDER")
    _, images = load_images(source)
    share_value_range(images, kept=read_value_range(folder))
    return MaskedImages(
        images,
        size=(size[0], size[-1]) if isinstance(size, list) else (size, size),
        patch_size=config.get("patch_size", 16),
        mean=statistics[0],
        std=statistics[1],
        seed=seed,
        native=record is not None and record.arguments.get("native_tiles", False),
    )


#: the classes that a fused encoder can be written as
EXTRACT = {"vit": extract_vit, "dinov2": extract_dinov2}


def fuse_run(
    run: Path, output_dir: Path, views: MaskedImages, count: int = 8, name: str | None = None, kind: str = "vit"
) -> float:
    """Fuse a run, check it on images, and write the stock ViT and the files that go with it.

    Args:
        run: a checkpoint, or the output folder of a run (its best checkpoint if it is unfinished).
        output_dir: folder for the stock model, image processor, record, curves, reconstructions and card.
        views: evaluation views for the check.
        count: how many of them to use.
        name: Hub id for the card.
        kind: class of the written encoder, ``vit`` or ``dinov2``.

    Returns:
        The largest difference between fused and unfused outputs, both computed in float32.

    Raises:
        UserError: there is no checkpoint, ``output_dir`` holds a run, or fused and unfused outputs disagree. Nothing is
            written then.
    """
    folder = model_folder(run)
    if output_dir.resolve() in (run.resolve(), folder.resolve()):
        raise UserError("--output_dir must not be the run's own folder")
    if any(output_dir.glob(f"model.{UNFUSED}*")):
        raise UserError(f"--output_dir {output_dir} holds the model of a run; choose another folder")
    mae = load_model(folder, "dbp_vit_mae", "vit_mae")
    vit = EXTRACT[kind](mae)
    pixels_BCHW = torch.stack([views[index]["pixel_values"] for index in range(min(count, len(views)))])
    difference, scale = largest_difference(mae, vit, pixels_BCHW)
    if not difference <= 1e-4 * max(scale, 1.0):
        raise UserError(f"fused and unfused outputs differ by {difference:.2e}; nothing was written")
    print(
        f"largest difference between fused and unfused outputs on {len(pixels_BCHW)} images: {difference:.2e} "
        f"(of {scale:.1f})"
    )
    unfinished = output_dir / UNFINISHED
    clear(unfinished)
    try:
        vit.save_pretrained(unfinished)
        ViTImageProcessorPil.from_pretrained(folder).save_pretrained(unfinished)
        plot_reconstructions(mae, views, unfinished / "reconstruction.png")
        if (folder / RECORD).is_file():
            record = RunRecord.read(folder / RECORD)
            record.results |= {"fusion_largest_difference": difference, "fusion_images": len(pixels_BCHW)}
            record.write(unfinished / RECORD)
            plot_curves(record.rows, unfinished / "curves.png", reference=record.results.get("interpolation_loss"))
        write_card(unfinished, name or str(output_dir))
        move_files(unfinished, output_dir)
    finally:
        clear(unfinished)
    return difference


def push_run(run: Path, fused: Path, destination: Destination, *, unfused: bool = False) -> None:
    """Push a fused run and, if asked for, the unfused model to a second repository; print their addresses.

    Raises:
        UserError: as for `Destination.push`.
    """
    print(f"pushed: {destination.push(fused)}")
    if unfused:
        destination, folder = destination.unfused.opened(), model_folder(run)
        write_card(folder, destination.repo_id)
        print(f"pushed: {destination.push(folder)}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments, fuse, and push if asked to. A user's mistake ends with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description="Fuse a pre-training run to a stock ViTModel.")
    parser.add_argument("run", type=Path, help="output folder of run_dbp_mae.py, or one of its checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the stock model")
    parser.add_argument(
        "--as", dest="kind", choices=list(EXTRACT), default="vit", help="stock class of the written encoder"
    )
    parser.add_argument("--image_dir", help="folder of images to check on (default: the run's validation images)")
    parser.add_argument("--num_images", type=int, default=8, help="how many images to check on")
    parser.add_argument("--push_to_hub", action="store_true", help="push the stock model, with the token of your login")
    parser.add_argument("--hub_model_id", help="its name on the Hub (default: that of the output folder)")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--push_unfused", action="store_true", help="push the unfused model too, to NAME-unfused")
    args = parser.parse_args(arguments)
    if args.num_images < 1:
        raise UserError(f"--num_images is the number of images to check on, at least 1, got {args.num_images}")
    destination = None
    if args.push_to_hub or args.push_unfused:
        repo_id = args.hub_model_id or args.output_dir.resolve().name
        destination = Destination(repo_id, private=args.private or None).opened()
    views = check_views(args.run, args.image_dir, args.num_images)
    name = None if destination is None else destination.repo_id
    fuse_run(args.run, args.output_dir, views, args.num_images, name, args.kind)
    load = ("Dinov2Model", "") if args.kind == "dinov2" else ("ViTModel", ", add_pooling_layer=False")
    print(f'stock model written; load it with {load[0]}.from_pretrained("{args.output_dir}"{load[1]})')
    if destination is not None:
        push_run(args.run, args.output_dir, destination, unfused=args.push_unfused)
