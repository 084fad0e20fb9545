"""Small models shared by the tests: every size is the smallest at which the property still shows."""

from collections.abc import Callable

import pytest
import torch

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig

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


@pytest.fixture
def mae_config() -> Callable[..., DBPViTMAEConfig]:
    """A maker of tiny ViT-MAE configurations; keyword arguments override fields."""
    return lambda **fields: DBPViTMAEConfig(**(TINY | fields))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
