"""How good is the encoder? k nearest neighbours and a linear probe on its frozen features: the main of `run_probe.py`.

1. Every image's largest central square, scaled to the ViT's size, goes once through the frozen ViT; its feature is the
   mean of the final patch tokens, or the class token.
2. k nearest neighbours: cosine similarity s to the training features, votes of the k nearest weighted by exp(s / 0.07)
   (Wu et al. 2018, as in DINO).
3. Linear probe: features standardised by the training set's statistics, multinomial logistic regression with an L2
   penalty, by L-BFGS. The penalty is chosen on a fifth of the training images; then all of them are fitted. If the best
   is the smallest or largest tried, another may be better, and that is told.

Accuracies come with 95 % Wilson intervals. The ViT is not trained. A folder of pictures, or each of its `train`,
`validation` ... if it has them, holds one folder per class. Images that cannot be read are left out and counted.

Shapes: N training images, M test images, D features, K classes.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import ViTModel

from hf_dbp.comparison.statistics import wilson_interval
from hf_dbp.data.arguments import ImageFlags, fields_of
from hf_dbp.data.classes import class_labels, image_list, ordered, split_classes
from hf_dbp.data.images import (
    ImageList,
    ImageSource,
    channel_statistics,
    read_splits,
    share_value_range,
    unreadable_images,
)
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.features import CentralSquares, pooled, token_batches
from hf_dbp.errors import UserError, command
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.hub.untrusted import read_statistics, read_value_range
from hf_dbp.natures import Nature
from hf_dbp.recipes import parse_arguments
from hf_dbp.records import arguments_record, hardware, source_commit, versions, write_json

__all__ = ["ProbeArguments", "extract_features", "knn_accuracy", "linear_accuracy", "main", "run"]

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class ProbeArguments(HubFlags, ImageFlags):
    """What to probe, and on which images."""

    model_name_or_path: Annotated[str, Nature("model")] = field(
        kw_only=True, metadata={"help": "Stock ViT, folder or Hub id."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of parquet files, or with one folder of images per class."}
    )
    label_column_name: Annotated[str, Nature("data")] = field(
        default="label", metadata={"help": "Column of the classes, numbers or names."}
    )
    train_val_split: float = field(
        default=0.2, metadata={"help": "Share of each class held out for testing if there is no such split."}
    )
    pooling: Annotated[str, Nature("training")] = field(
        default="mean", metadata={"help": "Feature: mean of the patch tokens, or cls.", "choices": ["mean", "cls"]}
    )
    neighbours: Annotated[int, Nature("training")] = field(
        default=20, metadata={"help": "k of the nearest neighbours."}
    )
    from_scratch: Annotated[bool, Nature("model")] = field(
        default=False, metadata={"help": "Use random weights of that shape, for comparison."}
    )
    batch_size: Annotated[int, Nature("nothing")] = field(default=64, metadata={"help": "Images per forward pass."})
    seed: Annotated[int, Nature("chance")] = field(
        default=0, metadata={"help": "Seed of the draws, the splits and the random weights."}
    )
    output_file: Annotated[str, Nature("nothing")] = field(
        default="probe.json", metadata={"help": "JSON file to write."}
    )

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise UserError(f"--neighbours is at least 1, got {self.neighbours}")

    def source(self) -> ImageSource:
        return ImageSource(**fields_of(ImageSource, self))


def extract_features(
    vit: ViTModel, images: torch.utils.data.Dataset[Tensor | None], pooling: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the readable images from the frozen ViT, float32 on the CPU, and which images these are."""
    features, readable = [], []
    for tokens_BTD, known in token_batches(vit, images, batch_size):
        readable += known
        if tokens_BTD is not None:
            features.append(pooled(tokens_BTD, pooling).float().cpu())
    return torch.cat(features), torch.tensor(readable)


def knn_accuracy(train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, truth_M: Tensor, k: int) -> int:
    """The number of test images that their k nearest training images classify correctly."""
    classes = int(max(labels_N.max(), truth_M.max())) + 1
    train_ND, test_MD = nn.functional.normalize(train_ND, dim=1), nn.functional.normalize(test_MD, dim=1)
    hits = 0
    for features_BD, truth_B in zip(torch.split(test_MD, 1024), torch.split(truth_M, 1024), strict=True):
        similarity_Bk, nearest_Bk = (features_BD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        votes_BK = torch.zeros(len(features_BD), classes)
        votes_BK.scatter_add_(1, labels_N[nearest_Bk], (similarity_Bk / TEMPERATURE).exp())
        hits += int((votes_BK.argmax(dim=1) == truth_B).sum())
    return hits


def linear_accuracy(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, truth_M: Tensor, seed: int
) -> tuple[int, float, bool]:
    """The number of test images that a linear probe classifies correctly, the penalty chosen on the training images,
    and whether that is the smallest or largest tried and better than the next, so that another may be better still."""
    order = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    classes = int(max(labels_N.max(), truth_M.max())) + 1
    right = [
        _hits(*_fitted(train_ND[kept], labels_N[kept], classes, penalty), train_ND[held], labels_N[held])
        for penalty in PENALTIES
    ]
    best = int(np.argmax(right))
    penalty = PENALTIES[best]
    at_edge = right[0] > right[1] if best == 0 else best == len(right) - 1  # the first of equal ones is the best
    return _hits(*_fitted(train_ND, labels_N, classes, penalty), test_MD, truth_M), penalty, at_edge


def _fitted(features_ND: Tensor, labels_N: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K) that minimise cross-entropy + penalty / 2 * |standardised weight|^2."""
    mean_D, std_D = features_ND.mean(dim=0), features_ND.std(dim=0, unbiased=False).clamp(min=1e-6)
    inputs_ND = (features_ND - mean_D) / std_D
    weight_KD = torch.zeros(classes, features_ND.shape[1], requires_grad=True)
    bias_K = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_KD, bias_K], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(nn.functional.linear(inputs_ND, weight_KD, bias_K), labels_N)
        loss = loss + penalty / 2 * weight_KD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight = weight_KD.detach() / std_D
    return weight, bias_K.detach() - weight @ mean_D


def _hits(weight_KD: Tensor, bias_K: Tensor, features_MD: Tensor, truth_M: Tensor) -> int:
    return int((nn.functional.linear(features_MD, weight_KD, bias_K).argmax(dim=1) == truth_M).sum())


def load_labelled(args: ProbeArguments) -> tuple[list[ImageList], list[Tensor], list[str]]:
    """Training and test images, their class numbers, and the class names.

    Raises:
        UserError: there are no such data or columns, there is only one class, or training lacks a class of the test
            images.
    """
    source = args.source()
    splits, left_out = read_splits(source, classes=True)
    left_out.warn(source.name)
    if "validation" not in splits:
        labels, _ = class_labels(splits["train"], args.label_column_name, source.name)
        rows = split_classes(labels, args.train_val_split, args.seed)
        splits = {name: splits["train"].select(part) for name, part in zip(("train", "validation"), rows, strict=True)}
    images, raw = [], []
    for split, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        data = splits[split]
        if limit is not None and limit < len(data):
            data = data.shuffle(seed=args.seed).select(range(limit))
        images.append(image_list(data, source, f"{split} image"))
        raw.append(class_labels(data, args.label_column_name, f"{source.name} ({split})")[0])
    images[0].left_out = left_out
    names = ordered(raw[0])
    if len(names) < 2:
        raise UserError(f"{source.name}: the training images have {len(names)} class; a probe needs two")
    unknown = sorted(set(raw[1]) - set(names))
    if unknown:
        remedy = "" if args.max_train_samples is None else f"raise --max_train_samples {args.max_train_samples}, or "
        raise UserError(
            f"{source.name}: {len(unknown)} test classes are not in training, e.g. {unknown[0]!r}; {remedy}add "
            f"training images of them or remove them from the test images"
        )
    number = {name: index for index, name in enumerate(names)}
    return images, [torch.tensor([number[name] for name in labels]) for labels in raw], names


def make_room_for(file: str) -> None:
    """Create the folder of the output file before the work begins. UserError if it cannot be written."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"--output_file {file} is a folder; name a file in it, such as {path / 'probe.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output_file {file} cannot be written ({error}); choose another place") from error


def run(args: ProbeArguments) -> dict[str, Any]:
    """Probe the encoder; return the content of `output_file`."""
    make_room_for(args.output_file)
    images, labels, names = load_labelled(args)
    vit = load_vit(args.model_name_or_path, **args.hub_options)
    if args.from_scratch:
        torch.manual_seed(args.seed)
        vit = ViTModel(vit.config, add_pooling_layer=False)
    for part in images:
        channels = part.readable(0).shape[2]
        if channels != vit.config.num_channels:
            raise UserError(
                f"the ViT takes {vit.config.num_channels} channels, the images have {channels}: "
                "convert with --num_channels"
            )
        part.num_channels = channels
    share_value_range(*images, kept=read_value_range(args.model_name_or_path, **args.hub_options))
    statistics = read_statistics(args.model_name_or_path, **args.hub_options)
    if statistics is None:
        logger.warning("%s has no image processor; using the images' statistics", args.model_name_or_path)
        statistics = channel_statistics(images[0])
    mean, std = statistics
    size = vit.config.image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    vit = vit.to("cuda" if torch.cuda.is_available() else "cpu")
    (train_ND, known), (test_MD, shown) = (
        extract_features(vit, CentralSquares(part, size, mean, std), args.pooling, args.batch_size) for part in images
    )
    labels_N, truth_M = labels[0][known], labels[1][shown]
    knn = knn_accuracy(train_ND, labels_N, test_MD, truth_M, args.neighbours)
    linear, penalty, at_edge = linear_accuracy(train_ND, labels_N, test_MD, truth_M, args.seed)
    if at_edge:
        logger.warning(
            "the best penalty of the linear probe, %g, is at the edge of those tried: its accuracy may be too low",
            penalty,
        )
    commonest = int((truth_M == labels_N.bincount().argmax()).sum())
    total = len(truth_M)
    record = {
        "schema": 1,
        "task": "probe",
        "knn": _score(knn, total) | {"k": min(args.neighbours, len(train_ND))},
        "linear": _score(linear, total) | {"penalty": penalty, "at_edge": at_edge},
        "commonest_class": _score(commonest, total),
        "data": {
            "source": args.source().name,
            "train_images": len(train_ND),
            "test_images": total,
            "classes": len(names),
            "unreadable": unreadable_images({}, *images),
            "left_out": images[0].left_out.record(),
        },
        "arguments": arguments_record(args),
        "commit": source_commit(),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(args.output_file, record)
    return record


def _score(hits: int, trials: int) -> dict[str, Any]:
    low, high = wilson_interval(hits, trials)
    return {"accuracy": hits / trials, "interval_95": [low, high]}


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags and recipe, and probe. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    (args,) = parse_arguments(
        (ProbeArguments,), arguments, "Measure the accuracy of kNN and a linear probe on a frozen ViT."
    )
    record = run(args)
    for name in ("knn", "linear", "commonest_class"):
        low, high = record[name]["interval_95"]
        print(f"{name:>16}  {record[name]['accuracy']:.4f}  (95 %: {low:.4f} to {high:.4f})")
    print(f"written to {args.output_file}")
    return record
