"""The fields of the smallest decorrelated ViT-MAE at which the properties that are tested still show."""

from typing import Any

from transformers import PreTrainedModel

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
