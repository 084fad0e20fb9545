"""Export an encoder or a segmenter as ONNX, checked against PyTorch: the main of `hf-dbp export`.

    hf-dbp export MODEL IMAGES --format onnx --output_dir outputs/onnx

writes `model.onnx`, `preprocessing.json`, `run.py`, which needs neither PyTorch nor hf_dbp, and `export.json`: the
largest difference from PyTorch on the given images, at two image sizes and two batch sizes, and the latency of both.

- An encoder (a stock ViT) takes any batch and any height and width that are multiples of the patch size; its positions
  are interpolated (bicubic) as in transformers. Output: `last_hidden_state` (B, 1 + T, D).
- A segmenter (UperNet or EoMT) takes any batch of windows of one size: ONNX cannot express UperNet's pooling to fixed
  grids for arbitrary sizes, and EoMT has one size. Whole images are processed in windows, in ONNX as in PyTorch.
  Output: `logits` (B, K, S, S).

Shapes: B batch, T patch tokens, D features, K classes, S side of a window.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import EomtForUniversalSegmentation, PreTrainedModel

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.images import ImageList, channel_statistics, share_value_range
from hf_dbp.data.one_split import image_source, open_images, split_flags
from hf_dbp.data.values import ValueRange
from hf_dbp.downstream import onnx_run
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.features import CentralSquares
from hf_dbp.downstream.segmentation.arguments import HEADS
from hf_dbp.downstream.segmentation.evaluation_settings import read_evaluated
from hf_dbp.downstream.segmentation.heads import check_crop, load_head, segmenter
from hf_dbp.downstream.segmentation.inference import Preparation, whole_image_logits
from hf_dbp.errors import UserError, command
from hf_dbp.hub.untrusted import read_config, read_statistics, read_value_range
from hf_dbp.records import hardware, versions, write_json

__all__ = ["export_model", "main"]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
CHECKED = 4  # images
TIMED = 10  # forward passes
MODEL = "model.onnx"


class Encoder(nn.Module):
    """pixel_values (B, C, H, W) -> last_hidden_state (B, 1 + T, D)."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        return tokens


class Segmenter(nn.Module):
    """pixel_values (B, C, S, S) -> logits (B, K, S, S)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def write_onnx(model: nn.Module, example: Tensor, file: Path, output: str, patch: tuple[int, int] | None) -> None:
    """Export with PyTorch's dynamo exporter, for any batch size and, with ``patch``, for sides that are its
    multiples."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}: pip install 'hf-dbp[onnx]'") from error
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=65536)}
    if patch is not None:
        free[2] = patch[0] * torch.export.Dim("rows", min=1, max=4096)
        free[3] = patch[1] * torch.export.Dim("columns", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes={"pixel_values": free}, verbose=False,
            input_names=["pixel_values"], output_names=[output],
        )  # fmt: skip
    assert program is not None
    program.save(str(file))


def difference(model: nn.Module, onnx_model: onnx_run.Model, batches: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The shape of each batch, and the largest difference between the outputs of PyTorch and onnxruntime."""
    found = []
    for pixels in batches:
        with torch.no_grad():
            expected = model(pixels).numpy()
        given = onnx_model.run(pixels.numpy())
        found.append({"shape": list(pixels.shape), "largest_difference": float(np.abs(given - expected).max())})
    return found


def latency(run: Callable[[], Any]) -> float:
    """Median milliseconds per call of a model, after two warm-up calls."""
    times = []
    for _ in range(TIMED + 2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times[2:]), 3)


def readable(images: ImageList, count: int) -> list[NDArray[Any]]:
    """The first readable images, on which to check the exported model."""
    found = []
    for index in range(len(images)):
        try:
            found.append(images[index])
        except UnreadableImageError:
            continue
        if len(found) == count:
            break
    return found


def export_encoder(
    source: str,
    images: list[NDArray[Any]],
    mean: Sequence[float],
    std: Sequence[float],
    folder: Path,
    value_range: ValueRange,
    **hub: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[float, float]]:
    """Write an encoder; return preprocessing, differences and the latencies of PyTorch and onnxruntime."""
    vit = load_vit(source, **hub).eval()
    model, size, patch = Encoder(vit), sides(vit.config.image_size), sides(vit.config.patch_size)
    none = ImageList([], "image")
    none.value_range = value_range
    squares = CentralSquares(none, size, mean, std)
    # not the model's own size, or the exporter would treat the two as one
    other = (size[0] + 2 * patch[0], size[1] + patch[1])
    larger = CentralSquares(none, other, mean, std)
    own, wide = (torch.stack([views.view(image) for image in images]) for views in (squares, larger))
    write_onnx(model, wide[:2], folder / MODEL, "last_hidden_state", patch)
    how = {"schema": 1, "kind": "encoder", "model": source, "size": list(size), "patch": list(patch),
           "mean": list(mean), "std": list(std), "value_range": list(value_range), "input": "pixel_values",
           "output": "last_hidden_state",
           "free_axes": ["batch", "height", "width"]}  # fmt: skip
    write_json(folder / "preprocessing.json", how)
    session = onnx_run.Model(folder, torch.get_num_threads())
    found = difference(model, session, [own[:1], own, wide[:1], wide])
    whole = max(
        float(np.abs(session.pixels(image) - view.numpy()).max()) for image, view in zip(images, own, strict=True)
    )
    found.append({"preprocessing": True, "largest_difference": whole})
    with torch.no_grad():
        return how, found, (latency(lambda: model(own[:1])), latency(lambda: session.run(own[:1].numpy())))


def without_masks(model: PreTrainedModel) -> PreTrainedModel:
    """The model; an EoMT's probabilities of masks become numbers, so that the exporter sees that they are 0."""
    if isinstance(model, EomtForUniversalSegmentation):
        del model.attn_mask_probs
        model.attn_mask_probs = [0.0] * model.config.num_blocks
    return model


def export_segmenter(
    source: str, images: list[NDArray[Any]], mean: Sequence[float], std: Sequence[float], folder: Path,
    crop_size: int | None, long_edge: int | None, value_range: ValueRange, **hub: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[float, float]]:  # fmt: skip
    """Write a segmenter; otherwise like `export_encoder`."""
    content = read_config(source, **hub)
    names = {int(number): str(name) for number, name in content["id2label"].items()}
    stock = load_head(content["model_type"], source, names, ignore_index=-100 if 255 in names else 255, **hub).eval()
    known = read_evaluated(content, source)
    encoder = content.get("backbone_config", content)
    side = crop_size or (known.crop_size if known else max(sides(encoder["image_size"])))
    check_crop(stock, side)
    network = segmenter(without_masks(stock))
    edge = long_edge or None
    if long_edge is None:
        edge = known.long_edge if known else side
    data = Preparation(edge, mean, std, value_range)
    pixels = [data.pixels(image) for image in images]
    padded = [
        nn.functional.pad(one, (0, max(0, side - one.shape[2]), 0, max(0, side - one.shape[1]))) for one in pixels
    ]
    windows = torch.stack([one[:, :side, :side] for one in padded])
    model = Segmenter(network)
    write_onnx(model, windows[:2], folder / MODEL, "logits", None)
    how = {"schema": 1, "kind": "segmenter", "model": source, "window": side, "long_edge": edge, "mean": list(mean),
           "std": list(std), "value_range": list(value_range), "labels": names, "input": "pixel_values",
           "output": "logits",
           "free_axes": ["batch"]}  # fmt: skip
    write_json(folder / "preprocessing.json", how)
    session = onnx_run.Model(folder, torch.get_num_threads())
    found = difference(model, session, [windows[:1], windows])
    for image in images[:2]:  # whole images, each at two sizes
        for part in (image, image[: max(1, image.shape[0] * 2 // 3)]):
            own = data.pixels(part)
            with torch.no_grad():
                logits = whole_image_logits(network, [own], side, batch_size=1, classes=len(names))[0]
                logits = nn.functional.interpolate(logits[None], part.shape[:2], mode="bilinear", align_corners=False)[
                    0
                ]
            gap = float(np.abs(session.logits(part) - logits.numpy()).max())
            found.append({"whole_image": list(part.shape[:2]), "largest_difference": gap})
    with torch.no_grad():
        return how, found, (latency(lambda: model(windows[:1])), latency(lambda: session.run(windows[:1].numpy())))


def export_model(
    source: str, images: ImageList, folder: Path, *, crop_size: int | None = None, long_edge: int | None = None,
    **hub: Any,
) -> dict[str, Any]:  # fmt: skip
    """Export an encoder or a segmenter and check it; return the content of `export.json`.

    Args:
        source: folder or Hub id of a stock ViT, or of a UperNet or EoMT over one.
        images: images for the check.
        folder: where to write.
        crop_size, long_edge: for a segmenter, as in its training; default: as it was evaluated.
        hub: cache_dir, token, revision.

    Raises:
        UserError: the model is of another kind, ONNX packages are missing, there are too few images, or outputs differ
            by more than 1e-4.
    """
    kind = read_config(source, **hub)["model_type"]
    pictures = readable(images, CHECKED)
    if len(pictures) < 2:
        raise UserError(f"only {len(pictures)} images can be read; the check needs two")
    folder.mkdir(parents=True, exist_ok=True)
    share_value_range(images, kept=read_value_range(source, **hub))
    mean, std = read_statistics(source, **hub) or channel_statistics(images)
    own = {"value_range": images.value_range, **hub}
    if kind in HEADS:
        how, found, times = export_segmenter(source, pictures, mean, std, folder, crop_size, long_edge, **own)
    else:
        how, found, times = export_encoder(source, pictures, mean, std, folder, **own)
    shutil.copyfile(str(onnx_run.__file__), folder / "run.py")
    record = {
        "schema": 1, "task": "export", "kind": how["kind"], "model": source, "checks": found, "tolerance": TOLERANCE,
        "latency_ms": {"pytorch": times[0], "onnxruntime": times[1], "threads": torch.get_num_threads()},
        "versions": versions(), "hardware": hardware(),
    }  # fmt: skip
    write_json(folder / "export.json", record)
    worst = max(check["largest_difference"] for check in found)
    if worst > TOLERANCE:
        raise UserError(f"{folder / MODEL} differs from PyTorch by {worst:.2g}, more than {TOLERANCE}: see export.json")
    return record


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, export and check. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    parser = argparse.ArgumentParser(
        prog="hf-dbp export", description="Export a model as ONNX and check it against PyTorch.", parents=split_flags()
    )
    parser.add_argument("model", help="Stock ViT, or UperNet or EoMT over one, folder or Hub id.")
    parser.add_argument("images", help="Images to check it on: folder, Hub id, or wire_bonding.")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="What to write.")
    parser.add_argument("--output_dir", default="outputs/onnx", help="Folder for the model and its files.")
    parser.add_argument("--crop_size", type=int, help="Side of a segmenter's windows (default: as it was evaluated).")
    parser.add_argument(
        "--long_edge", type=int, help="Long edge to scale images to; 0: native (default: as it was evaluated)."
    )
    args = parser.parse_args(arguments)
    images = open_images(image_source(args), args.split)
    record = export_model(
        args.model, images, Path(args.output_dir), crop_size=args.crop_size, long_edge=args.long_edge,
        cache_dir=args.cache_dir, token=args.token,
    )  # fmt: skip
    for check in record["checks"]:
        what = ", ".join(f"{name} {value}" for name, value in check.items() if name != "largest_difference")
        print(f"checked     {what}: largest difference from PyTorch {check['largest_difference']:.2g}")
    times = record["latency_ms"]
    print(f"latency     one image: PyTorch {times['pytorch']} ms, onnxruntime {times['onnxruntime']} ms")
    print(f"written     {MODEL}, preprocessing.json, run.py (needs numpy, pillow, onnxruntime), in {args.output_dir}")
    return record
