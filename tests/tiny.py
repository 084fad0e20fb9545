"""The smallest decorrelated ViT-MAE at which the properties that are tested still show, and its encoder."""

from typing import Any

import torch
from transformers import PreTrainedModel, ViTModel

from hf_dbp import DBPViTMAEConfig, DBPViTMAEForPreTraining, extract_vit
from hf_dbp.stock_vit_mae import initialize_mae_

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Under the name that this transformers has for it: the old one warns from 5.23 on."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)


def fused(**fields: Any) -> ViTModel:
    """The fused encoder of a decorrelated ViT-MAE in which every tensor differs from its initial value."""
    mae = DBPViTMAEForPreTraining(DBPViTMAEConfig(**(TINY | fields)))
    initialize_mae_(mae)
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return extract_vit(mae.eval().double())
