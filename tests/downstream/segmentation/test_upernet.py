"""The ViT inside the stock UperNet computes what the ViT computes, and the result needs no hf_dbp."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_dbp.downstream.beit import parameter_groups
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.segmentation.upernet import build_upernet, load_upernet, synchronize_batch_norm

NAMES = {k: f"class {k}" for k in range(5)}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 32), (32, 64)])
def test_hidden_states_are_the_vits(vit, channels, size):
    encoder = vit(num_channels=channels)
    model = build_upernet(encoder, NAMES).eval()
    pixels = torch.randn(2, channels, *size)
    with torch.no_grad():
        expected = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        states = model.backbone(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 5
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=3e-5)


def test_feature_maps_have_four_strides_and_evenly_spaced_depths(vit):
    model = build_upernet(vit(num_hidden_layers=12, patch_size=16, image_size=64), NAMES).eval()
    assert model.config.backbone_config.out_indices == [3, 6, 9, 12]
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, 128, 64)).feature_maps
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 16), (16, 8), (8, 4), (4, 2)]


def test_a_vit_without_query_biases_and_a_rectangular_one_work(vit):
    encoder = vit(image_size=[32, 64], qkv_bias=False)
    pixels = torch.randn(1, 3, 32, 64)
    model = build_upernet(encoder, NAMES).eval()
    assert model.backbone.beit.embeddings.position_embeddings.shape[1] == 1 + 8 * 8
    with torch.no_grad():
        expected = encoder(pixels, output_hidden_states=True).hidden_states[-1]
        state = model.backbone(pixels, output_hidden_states=True).hidden_states[-1]
    positions = encoder.embeddings.position_embeddings
    assert torch.equal(model.backbone.beit.embeddings.position_embeddings[:, 0], positions[:, 0])
    assert nn.functional.cosine_similarity(state, expected, dim=-1).mean() > 0.95  # resampled twice: near, not equal


@pytest.mark.slow
def test_saved_model_loads_where_hf_dbp_cannot_be_imported(upernet, tmp_path):
    model = upernet().eval()
    model.save_pretrained(tmp_path, save_original_format=False)
    pixels = torch.randn(1, 3, 64, 48)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import sys; sys.modules['hf_dbp'] = None\n"
        "import torch; from transformers import AutoModelForSemanticSegmentation\n"
        f"model = AutoModelForSemanticSegmentation.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"pixels = torch.load({str(tmp_path / 'pixels.pt')!r})\n"
        f"torch.save(model(pixels).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(pixels).logits, rtol=0, atol=1e-5)


def test_a_supervised_classifier_and_an_mae_are_starts(vit, tmp_path):
    classifier = ViTForImageClassification(ViTConfig(**{**vit().config.to_dict(), "num_labels": 3}))
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = load_vit(str(tmp_path / "classifier"))
    assert torch.equal(loaded.embeddings.cls_token, classifier.vit.embeddings.cls_token)
    small = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    mae = ViTMAEForPreTraining(ViTMAEConfig(**{name: getattr(vit().config, name) for name in names}, **small))
    mae.save_pretrained(tmp_path / "mae")
    loaded, own = load_vit(str(tmp_path / "mae")).state_dict(), mae.vit.state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_parameter_groups_cover_every_parameter_once(upernet, layer_decay):
    model = upernet()
    groups = parameter_groups(model, 1.0, 0.05, layer_decay)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rates) == len(list(model.parameters()))
    expected = {
        "backbone.beit.embeddings.cls_token": (layer_decay**5, 0.0),
        "backbone.beit.embeddings.position_embeddings": (layer_decay**5, 0.0),
        "backbone.beit.embeddings.patch_embeddings.projection.weight": (layer_decay**5, 0.05),
        "backbone.beit.layers.0.mlp.fc1.weight": (layer_decay**4, 0.05),
        "backbone.beit.layers.3.mlp.fc1.weight": (layer_decay, 0.05),
        "backbone.beit.layers.3.mlp.fc1.bias": (layer_decay, 0.0),
        "backbone.fpn.fpn2.weight": (1.0, 0.05),
        "decode_head.classifier.weight": (1.0, 0.05),
        "decode_head.bottleneck.batch_norm.weight": (1.0, 0.0),
    }
    parameters = dict(model.named_parameters())
    assert {name: rates[id(parameters[name])] for name in expected} == expected


def test_batch_norm_is_synchronised_on_gpus_only(upernet):
    model = upernet()
    keys = list(model.state_dict())
    synchronize_batch_norm(model, 2, torch.device("cpu"))
    synchronize_batch_norm(model, 1, torch.device("cuda"))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    synchronize_batch_norm(model, 2, torch.device("cuda"))
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert list(model.state_dict()) == keys
    block = model.decode_head.psp_modules.blocks[0]  # it runs its own Python list of layers
    assert isinstance(block.layers[1].batch_norm, nn.SyncBatchNorm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "3 layers"),
        ({"names": {0: "a", 2: "b"}}, r"class ids are \[0, 2\]"),
        ({"names": {0: "a"}}, "at least two"),
        ({"ignore_index": 4}, "ignore_index 4 is the class 'class 4'"),
    ],
)
def test_what_cannot_be_built_is_refused(vit, change, message):
    names, ignore_index = change.pop("names", NAMES), change.pop("ignore_index", 255)
    with pytest.raises(ValueError, match=message):
        build_upernet(vit(**change), names, ignore_index=ignore_index)
    with pytest.raises(ValueError, match="layer_decay is 0"):
        parameter_groups(build_upernet(vit(), NAMES), 1.0, 0.0, layer_decay=0.0)


def test_the_model_is_transformers_own_class(upernet):
    assert type(upernet()) is UperNetForSemanticSegmentation


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 2**40}, "is not that of a UperNet over a ViT"),
        ({"backbone_config": {"model_type": "swin"}}, "is not that of a UperNet over a ViT"),
        ({"backbone_config": {"model_type": "beit", "hidden_size": -1}}, "hidden_size is -1; expected"),
        ({"id2label": {"0": "a", "1": "b"}}, "has the classes .*'a'.*give those of its training"),
        ({"auxiliary_channels": 9}, r"has shape \[.*\] in its weights but"),
    ],
)
def test_a_saved_upernet_loads_by_its_sizes_alone(upernet, tmp_path, changed, message):
    model, pixels = upernet().eval(), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"quantization_config": {"quant_method": "none such"}}))
    loaded = load_upernet(str(tmp_path), NAMES).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    file.write_text(json.dumps(content | changed))
    with pytest.raises(ValueError, match=message):
        load_upernet(str(tmp_path), NAMES)
