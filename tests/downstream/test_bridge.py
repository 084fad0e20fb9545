"""The encoder as a stock DINOv2, and which stock heads take it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY
from torch import Tensor
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    DPTConfig,
    DPTForDepthEstimation,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_dbp import DBPViTMAEConfig, DBPViTMAEForPreTraining, decorrelated_layers, extract_dinov2, extract_vit
from hf_dbp.stock_vit_mae import initialize_mae_

DOCS = Path(__file__).parents[2] / "docs" / "heads.md"


def trained_mae(**fields: Any) -> DBPViTMAEForPreTraining:
    """A decorrelated ViT-MAE in which every tensor, R included, differs from its initial value."""
    mae = DBPViTMAEForPreTraining(DBPViTMAEConfig(**(TINY | fields)))
    initialize_mae_(mae)
    with torch.no_grad():
        for name, parameter in mae.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert any(True for _ in decorrelated_layers(mae))
    return mae.eval()


@pytest.mark.parametrize(
    "fields", [{}, {"num_channels": 1}, {"num_channels": 4, "image_size": 48}, {"patch_size": 16, "qkv_bias": False}]
)
def test_hidden_states_are_those_of_the_vit_in_float64(fields: dict[str, Any]) -> None:
    mae = trained_mae(**fields).double()
    vit, dinov2 = extract_vit(mae), extract_dinov2(mae)
    assert type(dinov2) is Dinov2Model
    assert not dinov2.training
    config = mae.config
    pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size, dtype=torch.float64)
    ours = vit(pixels, output_hidden_states=True)
    theirs = dinov2(pixels, output_hidden_states=True)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, rtol=0, atol=1e-10)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


def test_at_another_image_size_positions_are_resampled_as_those_of_the_vit() -> None:
    mae = trained_mae()
    pixels = torch.randn(2, 3, 48, 64)
    ours = extract_vit(mae)(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(extract_dinov2(mae)(pixels).last_hidden_state, ours, rtol=1e-5, atol=1e-5)


def test_a_stock_mae_and_a_vit_with_a_pooler_are_taken_too() -> None:
    stock = ViTMAEForPreTraining(ViTMAEConfig(**TINY))
    initialize_mae_(stock)
    vit = ViTModel(ViTConfig(**{k: v for k, v in TINY.items() if not k.startswith("decoder")}), add_pooling_layer=True)
    for model, encoder in ((stock, extract_vit(stock)), (vit, vit)):
        pixels = torch.randn(1, 3, 32, 32)
        theirs = extract_dinov2(model).eval()(pixels).last_hidden_state
        torch.testing.assert_close(theirs, encoder.eval()(pixels).last_hidden_state)


def test_what_a_dinov2_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="takes square images, this encoder 32 x 64"):
        extract_dinov2(trained_mae(image_size=(32, 64)))
    with pytest.raises(ValueError, match="this encoder's 40 is not one of 24"):
        extract_dinov2(trained_mae(intermediate_size=40))
    with pytest.raises(ValueError, match="expected a ViT-MAE"):
        extract_dinov2(torch.nn.Linear(2, 2))


# ---- heads ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2")
    extract_dinov2(trained_mae(num_channels=2)).save_pretrained(path)
    return path


def classifier(folder: Path) -> tuple[PreTrainedModel, Callable[[Any], Tensor]]:
    return Dinov2ForImageClassification.from_pretrained(folder, num_labels=3), lambda out: out.logits


def backbone(folder: Path) -> tuple[PreTrainedModel, Callable[[Any], Tensor]]:
    return Dinov2Backbone.from_pretrained(folder, out_indices=[1, 2]), lambda out: out.feature_maps[-1]


def over_backbone(folder: Path, head: PreTrainedModel) -> PreTrainedModel:
    """``head`` with the folder's encoder in place of its random one."""
    head.backbone.load_state_dict(Dinov2Backbone.from_pretrained(folder, out_indices=[1, 2]).state_dict())
    return head


def upernet(folder: Path) -> tuple[PreTrainedModel, Callable[[Any], Tensor]]:
    config = Dinov2Config.from_pretrained(folder, out_indices=[1, 2])
    head = UperNetConfig(backbone_config=config, hidden_size=8, num_labels=3, use_auxiliary_head=False)
    return over_backbone(folder, UperNetForSemanticSegmentation(head)), lambda out: out.logits


def dpt_config(folder: Path) -> DPTConfig:
    config = Dinov2Config.from_pretrained(folder, out_indices=[1, 2], reshape_hidden_states=False)
    return DPTConfig(
        backbone_config=config, neck_hidden_sizes=[8, 8], reassemble_factors=[1, 0.5], fusion_hidden_size=8,
        head_in_index=-1, num_labels=3, use_auxiliary_head=False,
    )  # fmt: skip


def dpt_depth(folder: Path) -> tuple[PreTrainedModel, Callable[[Any], Tensor]]:
    return over_backbone(folder, DPTForDepthEstimation(dpt_config(folder))), lambda out: out.predicted_depth


HEADS = {
    "Dinov2ForImageClassification": classifier,
    "Dinov2Backbone": backbone,
    "UperNetForSemanticSegmentation": upernet,
    "DPTForDepthEstimation": dpt_depth,
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_takes_the_encoder_and_trains_it(name: str, folder: Path) -> None:
    """Every tensor of the encoder arrives, and a step of the head's output reaches the patch projection."""
    model, output = HEADS[name](folder)
    encoder = Dinov2Model.from_pretrained(folder).state_dict()
    state = model.state_dict()
    for key, tensor in encoder.items():
        found = [value for other, value in state.items() if other == key or other.endswith(f".{key}")]
        assert len(found) == 1, key
        assert torch.equal(found[0], tensor), key
    output(model(torch.randn(2, 2, 32, 32))).square().mean().backward()
    (projection,) = (p for key, p in model.named_parameters() if key.endswith("patch_embeddings.projection.weight"))
    assert projection.grad is not None
    assert projection.grad.abs().max() > 0


def test_the_table_in_the_docs_is_these_heads() -> None:
    listed = re.findall(r"^\| `(\w+)` \| yes", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == list(HEADS)
