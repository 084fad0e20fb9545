"""From a pre-training run to a stock ViT: the main of `training_scripts/fuse_checkpoint.py`.

W R takes the place of (W, R) in every layer (paper section 2.2), the decoder is dropped, and the result is compared
with the unfused encoder on real images before anything is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForPreTraining, PreTrainedModel, ViTImageProcessorPil, ViTMAEForPreTraining, ViTModel

from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.masked import MaskedImages
from hf_dbp.modeling_dbp_vit_mae import extract_vit
from hf_dbp.pretraining import DataArguments
from hf_dbp.records import RunRecord
from hf_dbp.trainer import RECORD

__all__ = ["fuse_run", "largest_difference", "main"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def largest_difference(mae: ViTMAEForPreTraining, vit: ViTModel, pixels_BCHW: Tensor) -> tuple[float, float]:
    """Compare the unfused encoder, all patches visible, with the fused ViT on images, both in float32.

    Returns:
        The largest absolute difference of their last hidden states (B, 1 + T, D), and the largest absolute state.
    """
    encoder = mae.vit.float().eval()
    ratio, encoder.config.mask_ratio = encoder.config.mask_ratio, 0.0
    in_order = torch.arange(encoder.embeddings.patch_embeddings.num_patches, device=pixels_BCHW.device)
    try:
        unfused = encoder(pixels_BCHW, noise=in_order.expand(len(pixels_BCHW), -1)).last_hidden_state
    finally:
        encoder.config.mask_ratio = ratio
    fused = vit.float().eval()(pixels_BCHW).last_hidden_state
    return float((fused - unfused).abs().max()), float(unfused.abs().max())


def check_images(run: Path, image_dir: str | None, model: PreTrainedModel, count: int) -> Tensor:
    """Validation views of the run's own data, or of a folder: (count, C, H, W).

    Raises:
        ValueError: neither a folder nor a run record to say which data it was, or the data is gone.
    """
    record_file = next((folder / RECORD for folder in (run, run.parent) if (folder / RECORD).is_file()), None)
    if record_file is None:
        raise ValueError(f"{run} has no {RECORD}, which tells the data of the run; pass --image_dir FOLDER")
    record = RunRecord.read(record_file)
    if image_dir is not None:
        source = ImageSource(train_dir=image_dir, num_channels=model.config.num_channels)
    else:
        names = {field.name for field in dataclasses.fields(DataArguments)} & ImageSource.__dataclass_fields__.keys()
        given = {name: record.arguments[name] for name in names if name in record.arguments}
        source = ImageSource(**given | {"max_eval_samples": count}, seed=record.seed)
    _, images = load_images(source)
    views = MaskedImages(
        images,
        size=tuple(record.data["size"]),
        patch_size=model.config.patch_size,
        mean=record.data["mean"],
        std=record.data["std"],
        seed=record.seed,
    )
    return torch.stack([views[index]["pixel_values"] for index in range(min(count, len(views)))])


def fuse_run(run: Path, output_dir: Path, image_dir: str | None = None, count: int = 8) -> float:
    """Fuse, check on ``count`` images, and write stock ViT, image processor and record; returns the largest difference.

    Raises:
        ValueError: no checkpoint there, nothing to check on, or fused and unfused outputs disagree.
    """
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no model; give the output folder of a run or one of its checkpoint-N folders")
    if output_dir.resolve() == run.resolve():
        raise ValueError("--output_dir must be another folder than the run's")
    mae = AutoModelForPreTraining.from_pretrained(run)
    vit = extract_vit(mae)
    difference, scale = largest_difference(mae, extract_vit(mae), check_images(run, image_dir, mae, count))
    print(f"largest difference between fused and unfused outputs on {count} images: {difference:.2e} (of {scale:.1f})")
    if not difference <= 1e-4 * max(scale, 1.0):
        raise ValueError(f"fused and unfused outputs differ by {difference:.2e}; nothing was written")
    vit.save_pretrained(output_dir)
    ViTImageProcessorPil.from_pretrained(run).save_pretrained(output_dir)
    record_file = run / RECORD
    if record_file.is_file():
        record = RunRecord.read(record_file)
        record.results |= {"fusion_largest_difference": difference, "fusion_images": count}
        record.write(output_dir / RECORD)
    return difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and fuse. User mistakes end with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description="Fuse a pre-training run to a stock ViTModel.")
    parser.add_argument("run", type=Path, help="output folder of run_dbp_mae.py, or one of its checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the stock model is written")
    parser.add_argument("--image_dir", help="folder of images to check on (default: the run's validation images)")
    parser.add_argument("--num_images", type=int, default=8, help="how many images to check on")
    args = parser.parse_args(arguments)
    try:
        fuse_run(args.run, args.output_dir, args.image_dir, args.num_images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f'stock ViT written; load it with ViTModel.from_pretrained("{args.output_dir}", add_pooling_layer=False)')
