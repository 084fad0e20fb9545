"""16 bits: a user of a CPU that is slow in them is told so, and weights stored in them are loaded in float32."""

import json

import pytest
import torch
from tiny import TINY, fused
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_dbp import DBPViTMAEConfig, DBPViTMAEForPreTraining, extract_dinov2, precision
from hf_dbp.downstream.classification.model import build_classifier, load_classifier
from hf_dbp.downstream.detection.model import build_detector, load_detector
from hf_dbp.downstream.encoder import EncoderArguments, build_vit, load_vit
from hf_dbp.downstream.segmentation.eomt import build_eomt
from hf_dbp.downstream.segmentation.predictor import load_network
from hf_dbp.downstream.segmentation.upernet import build_upernet
from hf_dbp.hub.untrusted import read_config
from hf_dbp.precision import fast_in_16_bits
from hf_dbp.pretraining import build_model
from hf_dbp.training.arguments import ModelArguments, PretrainingArguments


@pytest.mark.parametrize("flag", ["bf16", "fp16", "bf16_full_eval", "fp16_full_eval"])
def test_flags_that_are_slow_on_this_cpu_are_named(tmp_path, monkeypatch, caplog, flag):
    def told(fast, **flags):
        monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: dtype == fast)
        caplog.clear()
        PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)
        return [message for message in caplog.messages if "20 times" in message]

    own, other = (torch.bfloat16, torch.float16) if flag.startswith("b") else (torch.float16, torch.bfloat16)
    (message,) = told(other, **{flag: True})
    assert message == f"--{flag} can take 20 times as long as float32 on this CPU; give --{flag} false"
    assert not told(own, **{flag: True})
    assert not told(None)


def test_only_cpus_are_asked(monkeypatch):
    monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: False)
    assert not fast_in_16_bits(torch.device("cpu"))
    assert all(fast_in_16_bits(torch.device(kind)) for kind in ("cuda", "mps", "xpu"))


def test_without_onednn_a_cpu_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.cpu_is_fast(torch.bfloat16)


NAMES = {0: "a", 1: "b"}
SMALL = {"num_queries": 8, "decoder_layers": 1, "decoder_width": 32, "query_groups": 2}


def mae():
    return DBPViTMAEForPreTraining(DBPViTMAEConfig(**TINY))


def encoder(**fields):
    return fused(num_hidden_layers=4, **fields).float()


def segformer():
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=2, **sizes))


def network(folder):
    return load_network(folder, read_config(folder))


def as_a_start(folder):
    return build_model(ModelArguments(model_name_or_path=folder, image_size=[32]), 3, seed=0)


def as_another_start(folder):
    return build_model(ModelArguments(model_name_or_path=folder, image_size=[48]), 3, seed=0)


def as_a_head(build):
    return lambda folder: build(build_vit(EncoderArguments(model_name_or_path=folder), 32, 3))


STORED = {
    "ViT": (encoder, load_vit),
    "ViT-MAE": (mae, load_vit),
    "DINOv2": (lambda: extract_dinov2(encoder()), load_vit),
    "start": (mae, as_a_start),
    "start at another size": (mae, as_another_start),
    "UperNet": (lambda: build_upernet(encoder(), NAMES, hidden_size=8, auxiliary_channels=8), network),
    "EoMT": (lambda: build_eomt(encoder(), NAMES, crop_size=32, num_queries=8), network),
    "SegFormer": (segformer, network),
    "classifier": (lambda: build_classifier(encoder(), ["a", "b"]), lambda folder: load_classifier(folder)[0]),
    "detector": (
        lambda: build_detector(encoder(), ["a", "b"], image_size=(32, 32), **SMALL),
        lambda folder: load_detector(folder)[0],
    ),
    "new UperNet": (encoder, as_a_head(lambda vit: build_upernet(vit, NAMES, hidden_size=8, auxiliary_channels=8))),
    "new EoMT": (encoder, as_a_head(lambda vit: build_eomt(vit, NAMES, crop_size=32, num_queries=8))),
    "new classifier": (encoder, as_a_head(lambda vit: build_classifier(vit, ["a", "b"]))),
    "new detector": (encoder, as_a_head(lambda vit: build_detector(vit, ["a", "b"], image_size=(32, 32), **SMALL))),
}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORED)
def test_weights_stored_in_16_bits_are_loaded_in_float32(tmp_path, name, kind):
    make, load = STORED[name]
    stored = make().to(kind)
    stored.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    loaded = load(str(tmp_path))
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    values = {tuple(tensor.float().flatten()[:64].tolist()) for tensor in stored.parameters() if tensor.any()}
    kept = {tuple(tensor.flatten()[:64].tolist()) for tensor in loaded.parameters()}
    assert len(values & kept) > 10  # nothing is rounded twice
