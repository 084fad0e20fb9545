"""Small models shared by the tests: every size is the smallest at which the property still shows."""

from collections.abc import Callable

import pytest
import torch
from tiny import TINY

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig


@pytest.fixture
def mae_config() -> Callable[..., DBPViTMAEConfig]:
    """A maker of tiny ViT-MAE configurations; keyword arguments override fields."""
    return lambda **fields: DBPViTMAEConfig(**(TINY | fields))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
