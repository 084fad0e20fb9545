"""The smallest ViT that UperNet takes, and a UperNet over it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import UperNetForSemanticSegmentation, ViTConfig, ViTModel

from hf_dbp.downstream.segmentation.upernet import build_upernet

TINY_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-2,
}


@pytest.fixture
def vit() -> Callable[..., ViTModel]:
    """A maker of tiny ViTs with every tensor drawn at random, zeros and ones of the initialisation included."""

    def make(**fields: Any) -> ViTModel:
        model = ViTModel(ViTConfig(**(TINY_VIT | fields)), add_pooling_layer=False).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    return make


@pytest.fixture
def upernet(vit: Callable[..., ViTModel]) -> Callable[..., UperNetForSemanticSegmentation]:
    """A maker of UperNets of 5 classes over tiny ViTs."""
    return lambda classes=5, **fields: build_upernet(
        vit(**fields), {k: f"class {k}" for k in range(classes)}, hidden_size=8, auxiliary_channels=8
    )
