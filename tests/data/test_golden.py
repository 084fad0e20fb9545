"""No figure changes for images that were read correctly before: see `golden`."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from golden import KINDS, figures

from hf_dbp.data.images import ImageList, channel_statistics
from hf_dbp.data.masked import MaskedImages
from hf_dbp.downstream.segmentation.data import LabelledImages, TrainingCrops
from hf_dbp.downstream.segmentation.inference import WholeImages
from hf_dbp.downstream.segmentation.transforms import Augmentation

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
API = SimpleNamespace(
    ImageList=ImageList, channel_statistics=channel_statistics, MaskedImages=MaskedImages,
    LabelledImages=LabelledImages, TrainingCrops=TrainingCrops, WholeImages=WholeImages, Augmentation=Augmentation,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_what_it_saw(tmp_path, kind):
    found = figures(tmp_path, kind, API)
    assert found.keys() == GOLDEN[kind].keys()
    for stage, values in found.items():
        np.testing.assert_allclose(values, GOLDEN[kind][stage], rtol=0, atol=2e-5, err_msg=f"{kind}: {stage}")
