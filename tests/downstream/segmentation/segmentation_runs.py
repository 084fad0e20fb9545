"""A tiny fine-tuning for the trainer's tests, in this process or as one of two: segmentation_runs.py FOLDER HEAD."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).parents[3]))

from hf_dbp.downstream.segmentation.data import LabelledImages, TrainingCrops
from hf_dbp.downstream.segmentation.eomt import build_eomt
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.downstream.segmentation.transforms import Augmentation
from hf_dbp.downstream.segmentation.upernet import build_upernet
from hf_dbp.training.processes import end_processes

CLASSES, CROP = 3, 32
RAND = torch.rand


def labelled(count: int, void: float = 0.0) -> LabelledImages:
    """Images whose channels show their ids, each in stripes of its own width; `void` of every second one is
    unlabelled."""
    rng, samples = np.random.default_rng(0), []
    for index in range(count):
        mask = (np.arange(40) // (4 + index % 5) % CLASSES)[None].repeat(40, axis=0)
        image = np.stack([mask * 80 + rng.integers(0, 40, mask.shape)] * 3, axis=2).astype(np.uint8)
        if index % 2:
            mask = np.where(rng.random(mask.shape) < void, 255, mask)
        samples.append({"image": image, "annotation": mask})
    return LabelledImages(samples, ("image", "annotation"), num_labels=CLASSES, ignore_index=255)


def frozen_batch_norm(model: nn.Module) -> None:
    """Keep BatchNorm in eval mode: in training it sees one micro-batch, which no accumulation can undo."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]


def same_points(*size: int, device: Any = None) -> torch.Tensor:
    """In place of `torch.rand`: EoMT's loss compares every mask at the same points, whatever batch it is in."""
    one = RAND(size[1:], generator=torch.Generator().manual_seed(0), device=device)
    return one.expand(size).clone()


def trainer(
    folder: Path, *, count: int = 8, void: float = 0.0, frozen: bool = False, head: str = "upernet", **options: Any
):
    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=CROP,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )
    names = {k: f"class {k}" for k in range(CLASSES)}
    model: Any = (
        build_eomt(vit, names, crop_size=CROP, num_queries=5, num_blocks=2)
        if head == "eomt"
        else build_upernet(vit, names, hidden_size=8, auxiliary_channels=8)
    )
    if frozen:
        frozen_batch_norm(model)
    images, statistics = labelled(count, void), {"mean": [0.5] * 3, "std": [0.25] * 3}
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
    }
    return SegmentationTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(defaults | options)),
        crop_size=CROP,
        train_dataset=TrainingCrops(images, Augmentation(CROP, CROP, 255), **statistics, seed=0),
        eval_dataset=WholeImages(labelled(5, 0.5), None, **statistics),
    )


def one_step(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """One step of plain gradient descent with rate 1: the change of the weights is the gradient."""
    run = trainer(
        folder, frozen=True, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_steps=1, **options
    )
    run.train()
    return run.model.state_dict()


if __name__ == "__main__":
    out, shared = Path(sys.argv[1]), {"head": sys.argv[2], "ddp_find_unused_parameters": False}
    torch.rand = same_points  # type: ignore[assignment]
    weights = one_step(out / "run", void=0.7, per_device_train_batch_size=2, **shared)
    torch.rand = RAND
    run = trainer(out / "run", max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2, **shared)
    run.train()
    metrics = run.evaluate()
    metrics["pixels"] = int(run.confusion_KK.sum())
    if os.environ["RANK"] == "0":
        torch.save(weights, out / "weights.pt")
        run.save_model(str(out / "model"))
    (out / f"metrics{os.environ['RANK']}.json").write_text(json.dumps(metrics))
    del run
    end_processes()
