"""The stock classifier over a ViT: the same hidden states, He et al.'s head, any start that the flag names."""

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from hf_dbp.downstream.beit import beit_fields, beit_state, parameter_groups
from hf_dbp.downstream.bridge import vit_of_dinov2
from hf_dbp.downstream.classification.model import build_classifier, load_classifier
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, extract_vit

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-3,
}  # fmt: skip


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def vit(**fields):
    return shaken(ViTModel(ViTConfig(**(SMALL | fields)), add_pooling_layer=False))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_hidden_states_are_the_vits_in_float64(channels):
    encoder = vit(num_channels=channels).double()
    beit = BeitModel(BeitConfig(**beit_fields(encoder.config)), add_pooling_layer=False).double().eval()
    beit.load_state_dict(beit_state(encoder), strict=False)
    pixels = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    expected = encoder(pixels, output_hidden_states=True).hidden_states
    found = beit(pixels, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10


def test_the_head_is_the_norm_of_the_patches_mean():
    model = build_classifier(vit(), ["cat", "dog"]).eval()
    assert model.classifier.weight.abs().max() < 1e-4 and not model.classifier.bias.any()  # He et al.'s 2e-5
    shaken(model)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = model.beit(pixels, output_hidden_states=True).hidden_states[-1]
    norm = nn.functional.layer_norm(
        tokens[:, 1:].mean(dim=1), (24,), model.beit.pooler.layernorm.weight, model.beit.pooler.layernorm.bias, 1e-3
    )
    torch.testing.assert_close(model(pixels).logits, model.classifier(norm))
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.label2id == {"cat": 0, "dog": 1}


def test_paths_are_dropped_in_training_alone():
    model = shaken(build_classifier(vit(), ["cat", "dog"], drop_path=0.5))
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.beit.layers]
    assert rates == [0.0, 0.25, 0.5]
    pixels = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_another_view_resamples_the_positions_once():
    encoder = vit()
    model = build_classifier(encoder, ["cat", "dog"], image_size=(48, 48)).eval()
    pixels = torch.randn(1, 3, 48, 48)
    expected = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(
        model.beit(pixels, output_hidden_states=True).hidden_states[-1], expected, atol=1e-4, rtol=1e-4
    )
    wide = build_classifier(vit(image_size=(16, 32)), ["cat", "dog"]).eval()
    assert wide(torch.randn(1, 3, 16, 32)).logits.shape == (1, 2)
    with pytest.raises(UserError, match="40 is not a multiple"):
        build_classifier(vit(patch_size=16), ["cat", "dog"], image_size=(40, 40))


def test_a_dinov2_is_a_vit_whose_weights_hold_its_layer_scale(tmp_path):
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7,
        num_channels=4,
    )  # fmt: skip
    dinov2 = shaken(Dinov2Model(config)).double()
    pixels = torch.randn(2, 4, 28, 28, dtype=torch.float64)
    found = vit_of_dinov2(dinov2).eval()(pixels).last_hidden_state
    assert (found - dinov2(pixels).last_hidden_state).abs().max() < 1e-10
    dinov2.float().save_pretrained(tmp_path)
    loaded = load_vit(str(tmp_path)).eval()
    torch.testing.assert_close(loaded(pixels.float()).last_hidden_state.double(), found, atol=1e-4, rtol=1e-4)
    gated = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, use_swiglu_ffn=True))
    with pytest.raises(UserError, match="gated MLP"):
        vit_of_dinov2(gated)


def test_an_unfused_run_is_a_start_too(mae_config, tmp_path):
    model = shaken(DBPViTMAEForPreTraining(mae_config()))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    expected = extract_vit(model).eval()(pixels).last_hidden_state
    torch.testing.assert_close(load_vit(str(tmp_path)).eval()(pixels).last_hidden_state, expected)


def test_other_models_are_no_start_and_no_classifier(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BeitForImageClassification(BeitConfig(**small, image_size=16)).save_pretrained(tmp_path / "beit")
    with pytest.raises(UserError, match="holds a 'beit' model; give a ViT, a ViT-MAE or a DINOv2"):
        load_vit(str(tmp_path / "beit"))
    DeiTModel(DeiTConfig(**small, image_size=16)).save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match=r"is a distilled DeiT, .*facebook/deit-base-patch16-224"):
        load_vit(str(tmp_path / "deit"))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit_base_patch16_224.mae", "num_classes": 0}')
    with pytest.raises(UserError, match=r"is timm's 'vit_base_patch16_224\.mae'; take a model in transformers' form"):
        load_vit(str(tmp_path / "timm"))
    vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="holds ViTModel, not a classifier"):
        load_classifier(str(tmp_path / "vit"))


def test_layers_learn_the_slower_the_deeper_they_lie():
    model = build_classifier(vit(), ["cat", "dog"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in parameter_groups(model, 1.0, 0.05, 0.5) for p in g["params"]}
    assert rates["beit.embeddings.cls_token"] == 0.5**4
    assert [rates[f"beit.layers.{layer}.mlp.fc1.weight"] for layer in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["beit.pooler.layernorm.weight"] == rates["classifier.weight"] == 1.0
    assert len(rates) == len(names)
