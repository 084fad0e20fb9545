"""Small models shared by the tests, every size the smallest at which the property still shows; and work that the tests
do once instead of many times."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import TINY

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.data import wire_bonding


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Leave what is there out of later garbage collections: a Trainer collects several times a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def scenes_rendered_once() -> Iterator[None]:
    """Runs share the built-in images, of which each is a function of its index, seed and size."""
    once = functools.lru_cache(maxsize=4096)(wire_bonding.render)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_bonding, "render", lambda *args, **how: tuple(part.copy() for part in once(*args, **how)))
        yield


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[list[None]]:
    """The pictures of runs are one white pixel, not worth a third of a tiny run, unless this list holds something."""
    whole, rendered = Figure.savefig, []

    def savefig(self: Figure, file: Any, **options: Any) -> None:
        if rendered or not isinstance(file, str | Path):
            whole(self, file, **options)
        else:
            Image.new("RGB", (1, 1), "white").save(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield rendered


@pytest.fixture
def real_pictures(blank_pictures: list[None]) -> Iterator[None]:
    """For tests that look at pictures of runs."""
    blank_pictures.append(None)
    yield
    blank_pictures.pop()


@pytest.fixture
def mae_config() -> Callable[..., DBPViTMAEConfig]:
    """A maker of tiny ViT-MAE configurations; keyword arguments override fields."""
    return lambda **fields: DBPViTMAEConfig(**(TINY | fields))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
