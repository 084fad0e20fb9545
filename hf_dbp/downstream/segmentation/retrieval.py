"""Segmentation without training: a patch takes the labels of the most similar patches. The main of `hf-dbp retrieve`.

1. Memory: the labelled images, scaled as in fine-tuning, go through the frozen ViT in windows of its own size. Each
   patch contributes its final token and the share of each class among its labelled pixels; patches without any are left
   out.
2. A patch of a new image looks up the k tokens with the highest cosine s (of centred tokens) and takes the mean of
   their shares, weighted by exp(s / tau) (Wu et al. 2018; for scenes Balazevic et al. 2023, "Hummingbird").
3. Shares are scaled to pixels (bilinear); their logarithms are the logits, so whole images, mean IoU and pictures work
   as in fine-tuning.

Nothing is trained: building the model takes one pass over the labelled images. Boundaries are as coarse as patches.

Shapes: B windows, C channels, S side of a window, T = (S / p)^2 patches of p pixels, D features, K classes, M patches
in memory, k neighbours, Q queries, N pixels of a patch.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTModel

from hf_dbp.data.images import channel_statistics, share_value_range, unreadable_images
from hf_dbp.downstream.encoder import check_channels, load_vit
from hf_dbp.downstream.neighbours import centred, nearest
from hf_dbp.downstream.segmentation.data import LabelledImages, load_labelled_images
from hf_dbp.downstream.segmentation.detection import detection, image_figures
from hf_dbp.downstream.segmentation.evaluation_settings import MEMORY_SETTINGS, Evaluated
from hf_dbp.downstream.segmentation.figures import plot_predictions, plot_worst
from hf_dbp.downstream.segmentation.finetuning import DataArguments, image_processor
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels
from hf_dbp.downstream.segmentation.mean_iou import class_scores, scores_from_confusion
from hf_dbp.downstream.segmentation.sliding import BATCH, window_origins
from hf_dbp.errors import UserError, command
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.hub.untrusted import read_statistics, read_value_range
from hf_dbp.natures import Nature
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, hardware, source_commit, versions, write_json

__all__ = ["RetrievalArguments", "RetrievalSegmenter", "build_memory", "load_retrieval", "main", "run"]

logger = logging.getLogger(__name__)

MEMORY = "memory.safetensors"


class RetrievalSegmenter(nn.Module):
    """A frozen ViT with a memory of labelled patches, on one device; called like a UperNet.

    Args:
        vit: stock ViT.
        memory_MD: tokens of the labelled patches.
        shares_MK: the share of each class in them; rows sum to 1.
        id2label: class names.
        neighbours: k.
        temperature: tau.
    """

    config: SimpleNamespace
    memory_MD: Tensor
    shares_MK: Tensor
    mean_D: Tensor
    keys_MD: Tensor

    def __init__(
        self, vit: ViTModel, memory_MD: Tensor, shares_MK: Tensor, id2label: dict[int, str], *,
        neighbours: int = 30, temperature: float = 0.05,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vit, self.neighbours, self.temperature = vit.eval(), neighbours, temperature
        memory_MD = memory_MD.to(vit.device, torch.float32)
        mean_D = memory_MD.mean(dim=0)
        own = {"memory_MD": memory_MD, "shares_MK": shares_MK.to(memory_MD), "mean_D": mean_D}
        for name, tensor in (own | {"keys_MD": centred(memory_MD, mean_D)}).items():
            self.register_buffer(name, tensor)
        self.config = SimpleNamespace(id2label=id2label)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Logits (B, K, S, S) of normalised windows (B, C, S, S), as the attribute ``logits``."""
        tokens_BTD = patch_tokens(self.vit, pixel_values)
        queries_QD = centred(tokens_BTD.flatten(0, 1), self.mean_D)
        similarity_Qk, row_Qk = nearest(self.keys_MD, queries_QD, self.neighbours)
        weight_Qk = (similarity_Qk / self.temperature).softmax(dim=1)
        shares_QK = torch.einsum("qk,qkc->qc", weight_Qk, self.shares_MK[row_Qk])
        height, width = (
            side // patch for side, patch in zip(pixel_values.shape[2:], patch_size(self.vit), strict=True)
        )
        shares_BKhw = shares_QK.reshape(len(pixel_values), height, width, -1).permute(0, 3, 1, 2)
        shares = nn.functional.interpolate(shares_BKhw, pixel_values.shape[2:], mode="bilinear", align_corners=False)
        return SimpleNamespace(logits=(shares + 1e-6).log())

    def save_pretrained(self, folder: Path, **settings: Any) -> None:
        """Write the ViT as a stock model and, beside it, the memory and all settings, including ``settings``, as
        JSON."""
        self.vit.save_pretrained(folder)
        memory = {"tokens": self.memory_MD, "shares": self.shares_MK}
        save_file({name: tensor.cpu().contiguous() for name, tensor in memory.items()}, folder / MEMORY)
        own = {"neighbours": self.neighbours, "temperature": self.temperature, "id2label": self.config.id2label}
        write_json(folder / MEMORY_SETTINGS, {"schema": 1, **own, **settings})


def load_retrieval(folder: str | Path) -> tuple[RetrievalSegmenter, dict[str, Any]]:
    """Load the model that `hf-dbp retrieve` wrote, and its settings.

    Raises:
        UserError: there is none, or its files do not fit together.
    """
    path = Path(folder)
    try:
        settings = json.loads((path / MEMORY_SETTINGS).read_text(encoding="utf-8"))
        memory = load_file(path / MEMORY)
        names = {int(number): str(name) for number, name in settings["id2label"].items()}
        neighbours, temperature = int(settings["neighbours"]), float(settings["temperature"])
        settings.setdefault("batch_size", BATCH)  # the first memories did not keep it
        Evaluated(*(settings[name] for name in ("crop_size", "long_edge", "batch_size")))
        int(settings["ignore_index"])
        tokens_MD, shares_MK = memory["tokens"], memory["shares"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a folder of `hf-dbp retrieve`: {' '.join(str(error).split())}") from error
    vit = load_vit(str(folder))
    if tokens_MD.shape[1:] != (vit.config.hidden_size,) or shares_MK.shape != (len(tokens_MD), len(names)):
        raise UserError(f"{path / MEMORY} does not fit the ViT or the classes beside it; run `hf-dbp retrieve` again")
    model = RetrievalSegmenter(vit, tokens_MD, shares_MK, names, neighbours=neighbours, temperature=temperature)
    return model, settings


def patch_size(vit: ViTModel) -> tuple[int, int]:
    size = vit.config.patch_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patch_tokens(vit: ViTModel, pixels_BCSS: Tensor) -> Tensor:
    """The final patch tokens (B, T, D), float32."""
    size = vit.config.image_size
    own = tuple(pixels_BCSS.shape[2:]) == ((size, size) if isinstance(size, int) else tuple(size))
    tokens: Tensor = vit(pixels_BCSS, interpolate_pos_encoding=not own).last_hidden_state
    return tokens[:, 1:].float()


def class_shares(mask_SS: NDArray[np.int32], patch: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """The share of each class among each patch's labelled pixels (T, K), and how many are labelled (T)."""
    height, width = mask_SS.shape[0] // patch[0], mask_SS.shape[1] // patch[1]
    cells_TN = mask_SS.reshape(height, patch[0], width, patch[1]).transpose(0, 2, 1, 3).reshape(height * width, -1)
    ids_TN = torch.from_numpy(np.ascontiguousarray(cells_TN)).long()
    known_TN = (ids_TN >= 0) & (ids_TN < classes)
    counts_TK = torch.zeros(len(ids_TN), classes + 1).scatter_add_(
        1, torch.where(known_TN, ids_TN, classes), torch.ones(ids_TN.shape)
    )[:, :classes]
    labelled_T = counts_TK.sum(dim=1)
    return counts_TK / labelled_T.clamp(min=1)[:, None], labelled_T


@torch.no_grad()
def build_memory(
    vit: ViTModel, data: WholeImages, crop_size: int, classes: int, limit: int, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Tokens (M, D) and class shares (M, K) of the labelled patches, and counts of images and patches.

    Args:
        vit: frozen ViT.
        data: labelled images, scaled and normalised as by `WholeImages`.
        crop_size: S, a multiple of the patch size.
        classes: K.
        limit: maximum number of patches; of more, a random choice is kept.
        seed: seed of that choice.

    Raises:
        UserError: there is no labelled patch.
    """
    tokens, shares, images, void = [], [], 0, 0
    for index in range(len(data)):
        item = data[index]
        if item is None:
            continue
        pixels_CHW, mask_HW = item
        images += 1
        ids = torch.from_numpy(np.where(mask_HW == data.images.ignore_index, -1, mask_HW).astype(np.float64))
        ids = nn.functional.interpolate(ids[None, None], pixels_CHW.shape[1:], mode="nearest-exact")[0, 0]
        pad = (0, max(0, crop_size - pixels_CHW.shape[2]), 0, max(0, crop_size - pixels_CHW.shape[1]))
        pixels_CHW = nn.functional.pad(pixels_CHW, pad)
        labels_HW = nn.functional.pad(ids, pad, value=-1).numpy().astype(np.int32)  # -1 is not a class
        for top in window_origins(pixels_CHW.shape[1], crop_size):
            for left in window_origins(pixels_CHW.shape[2], crop_size):
                window = slice(top, top + crop_size), slice(left, left + crop_size)
                shares_TK, labelled_T = class_shares(labels_HW[window], patch_size(vit), classes)
                token_TD = patch_tokens(vit, pixels_CHW[:, window[0], window[1]][None].to(vit.device))[0].cpu()
                tokens.append(token_TD[labelled_T > 0])
                shares.append(shares_TK[labelled_T > 0])
                void += int((labelled_T == 0).sum())
    found = sum(map(len, tokens))
    if not found:
        raise UserError("the labelled images hold no labelled pixel: give others")
    memory_MD, shares_MK = torch.cat(tokens), torch.cat(shares)
    if found > limit:
        logger.warning("keeping %d of %d labelled patches, at random; --memory keeps more", limit, found)
        kept = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        memory_MD, shares_MK = memory_MD[kept], shares_MK[kept]
    counts = {"images": images, "patches": len(memory_MD), "left_out": found - len(memory_MD), "void": void}
    return memory_MD, shares_MK, counts


@dataclass
class RetrievalData(DataArguments):
    """Which labelled images, and how they are cut into windows."""

    crop_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Side of the square windows, a multiple of the patch size (default: the ViT's)."},
    )


@dataclass
class RetrievalArguments(HubFlags):
    """Which encoder, and how its neighbours vote."""

    model_name_or_path: Annotated[str, Nature("model")] = field(
        kw_only=True, metadata={"help": "Stock ViT, folder or Hub id."}
    )
    output_dir: Annotated[str, Nature("nothing")] = field(
        default="outputs/retrieval", metadata={"help": "Folder for all output."}
    )
    neighbours: Annotated[int, Nature("training")] = field(
        default=30, metadata={"help": "k, the number of labelled patches that vote on a patch."}
    )
    temperature: Annotated[float, Nature("training")] = field(
        default=0.05, metadata={"help": "tau; the lower it is, the more the nearest ones count."}
    )
    memory: Annotated[int, Nature("training")] = field(
        default=200_000, metadata={"help": "Maximum number of labelled patches; of more, a random choice is kept."}
    )
    batch_size: Annotated[int, Nature("nothing")] = field(default=8, metadata={"help": "Windows per forward pass."})
    seed: Annotated[int, Nature("chance")] = field(default=0, metadata={"help": "Seed of that choice."})

    def __post_init__(self) -> None:
        for name in ("neighbours", "temperature", "memory", "batch_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is above 0, got {getattr(self, name)}")


def statistics_of(
    args: RetrievalArguments, images: LabelledImages, validation: LabelledImages
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel for retrieval: those of the ViT's image processor, else of the images.

    Gives both lists their range of values.
    """
    kept = read_value_range(args.model_name_or_path, **args.hub_options)
    share_value_range(images, validation, kept=kept)
    statistics = read_statistics(args.model_name_or_path, **args.hub_options)
    if statistics is None:
        logger.warning("%s has no image processor; taking the images' statistics", args.model_name_or_path)
        return channel_statistics(images.images_alone())
    return statistics


def run(args: RetrievalArguments, data_args: DataArguments) -> dict[str, Any]:
    """Build the memory, evaluate on the validation images and save; return the content of `eval.json`."""
    source = data_args.source(args.cache_dir, args.token)
    train_images, eval_images = load_labelled_images(source)
    vit = (
        load_vit(args.model_name_or_path, **args.hub_options).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    )
    check_channels(vit.config.num_channels, train_images.num_channels)
    size = vit.config.image_size
    data_args.crop_size = crop = data_args.crop_size or (size if isinstance(size, int) else min(size))
    if any(crop % side for side in patch_size(vit)):
        raise UserError(f"--crop_size {crop} is not a multiple of the patch size {patch_size(vit)[0]}")
    mean, std = statistics_of(args, train_images, eval_images)
    names = source.class_names()
    train_data, eval_data = (
        WholeImages(images, data_args.scaled_long_edge, mean, std) for images in (train_images, eval_images)
    )
    began = time.monotonic()
    memory_MD, shares_MK, counts = build_memory(vit, train_data, crop, len(names), args.memory, args.seed)
    model = RetrievalSegmenter(
        vit, memory_MD, shares_MK, names, neighbours=args.neighbours, temperature=args.temperature
    )
    built = time.monotonic() - began
    batches = ([eval_data[index]] for index in range(len(eval_data)))
    found = count_pixels(
        model, batches, num_labels=len(names), ignore_index=source.ignore_index, crop_size=crop,
        batch_size=args.batch_size,
    )  # fmt: skip
    confusion_KK, loss_sum, images = found.confusion_KK, found.loss_sum, image_figures(found.images)
    record = {
        **figures(confusion_KK, names), "loss": loss_sum / confusion_KK.sum(),
        "detection": detection(images), "images": [asdict(image) for image in images],
        "data": {
            "source": source.name, "train_images": len(train_images), "validation_images": len(eval_images),
            "validation_pixels": int(confusion_KK.sum()),
            "unreadable": unreadable_images({}, train_images, eval_images),
        },
        "memory": counts | {"seconds": round(built, 3)},
        "predict_seconds": round(time.monotonic() - began - built, 3),
        "arguments": arguments_record(args, data_args), "commit": source_commit(), "versions": versions(),
        "hardware": hardware(),
    }  # fmt: skip
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(
        folder,
        **Evaluated(crop, data_args.scaled_long_edge, args.batch_size).record(),
        ignore_index=source.ignore_index,
    )
    image_processor(eval_data).save_pretrained(folder)
    write_json(folder / "eval.json", record)
    plot_predictions(model, eval_data, folder / "predictions.png", crop_size=crop)
    plot_worst(model, eval_data, images, folder / "worst.png", crop_size=crop)
    return record


def figures(confusion_KK: NDArray[np.int64], names: dict[int, str]) -> dict[str, Any]:
    """The figures of retrieval's `eval.json`, from a confusion matrix."""
    scores, pixels_K = scores_from_confusion(confusion_KK), confusion_KK.sum(axis=1)
    return {
        "schema": 1,
        "task": "segmentation",
        "method": "retrieval",
        "mean_iou": scores["mean_iou"],
        "mean_accuracy": scores["mean_accuracy"],
        "overall_accuracy": scores["overall_accuracy"],
        "majority_class_mean_iou": float(pixels_K.max() / pixels_K.sum() / np.count_nonzero(pixels_K)),
        "per_class": class_scores(np.diag(confusion_KK), pixels_K, confusion_KK.sum(axis=0), names),
        "confusion": {"rows": "true", "columns": "predicted", "pixels": confusion_KK.tolist()},
    }


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and run. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    args, data_args = parse_arguments((RetrievalArguments, RetrievalData), arguments)
    record = run(args, data_args)
    print(
        f"memory      {record['memory']['patches']} patches of {record['memory']['images']} images, in "
        f"{record['memory']['seconds']:.1f} s; validation in {record['predict_seconds']:.1f} s\n"
        f"mean IoU    {record['mean_iou']:.4f} (most common class everywhere: {record['majority_class_mean_iou']:.4f})"
    )
    for name, scores in record["per_class"].items():
        print(f"            {name:<20} IoU " + ("absent" if scores["iou"] is None else f"{scores['iou']:.4f}"))
    print(
        f"written     model, eval.json, predictions.png and worst.png, in {args.output_dir}\n"
        f"next        hf-dbp predict {shlex.quote(args.output_dir)} IMAGES --output_dir OUT"
    )
    return record
