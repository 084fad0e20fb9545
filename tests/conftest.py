"""Small models shared by the tests, every size the smallest at which the property still shows; and work that the tests
do once instead of many times."""

import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import TINY

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.data import wire_bonding

PICTURES = {
    "pretraining": ["plot_curves", "plot_reconstructions"],
    "fusing": ["plot_curves", "plot_reconstructions"],
    "downstream.finetuning": ["plot_curves"],
    "downstream.classification.finetuning": ["plot_calibration", "plot_confusion", "plot_mistakes"],
    "downstream.detection.finetuning": ["plot_detections"],
    "downstream.segmentation.finetuning": ["plot_predictions"],
    "downstream.segmentation.retrieval": ["plot_predictions"],
    "downstream.selection": ["write_pictures"],
    "inspection.contact_sheet": ["write_pictures"],
    "inspection.object_survey": ["write_pictures"],
}


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


def blank_unless(rendered: list[None], plot: Callable[..., None]) -> Callable[..., None]:
    """``plot``, or one white pixel in its place while ``rendered`` is empty."""
    signature = inspect.signature(plot)

    @functools.wraps(plot)
    def plotted(*args: Any, **options: Any) -> None:
        if rendered:
            plot(*args, **options)
        else:
            Image.new("RGB", (1, 1), "white").save(signature.bind(*args, **options).arguments["path"])

    return plotted


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[list[None]]:
    """Runs leave blank pictures, as drawing them takes half of a tiny run, unless this list holds something."""
    rendered: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in PICTURES.items():
            for name in names:
                place = f"hf_dbp.{module}.{name}"
                plot = getattr(importlib.import_module(f"hf_dbp.{module}"), name)
                patch.setattr(place, blank_unless(rendered, plot))
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
