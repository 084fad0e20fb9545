"""A stock RF-DETR whose feature maps are the encoder's hidden states."""

import math
from typing import Any

import pytest
import torch
from tiny import TINY, fused
from transformers import RfDetrForInstanceSegmentation, RfDetrForObjectDetection, ViTConfig, ViTModel
from transformers.loss import loss_rf_detr

from hf_dbp.downstream.beit import parameter_groups
from hf_dbp.downstream.detection.model import backbone_of, build_detector, is_detector, load_detector, stock_detector
from hf_dbp.downstream.detection.trainer import guarded
from hf_dbp.errors import UserError

SMALL: dict[str, Any] = {"query_groups": 2, "decoder_layers": 2, "decoder_width": 32}


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (32, 32)),
        ({"num_channels": 4, "image_size": 48, "num_hidden_layers": 5}, (48, 48)),
        ({"qkv_bias": False}, (32, 32)),
    ],
)
@pytest.mark.parametrize("instances", [False, True])
def test_feature_maps_are_the_hidden_states_of_the_encoder(
    fields: dict[str, Any], size: tuple[int, int], instances: bool
) -> None:
    vit = fused(**fields)
    model = build_detector(vit, ["a", "b"], image_size=size, instances=instances, **SMALL).eval()
    assert type(model) is (RfDetrForInstanceSegmentation if instances else RfDetrForObjectDetection)
    pixels = torch.randn(2, vit.config.num_channels, *size, dtype=torch.float64)
    hidden = vit(pixels, output_hidden_states=True).hidden_states
    backbone = backbone_of(model)
    maps = backbone(pixels).feature_maps
    depths = backbone.config.out_indices
    assert depths[-1] == vit.config.num_hidden_layers and len(maps) == len(depths)
    for depth, found in zip(depths, maps, strict=True):
        expected = vit.layernorm(hidden[depth])[:, 1:].transpose(1, 2).reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_at_another_size_the_positions_are_those_that_the_vit_resamples() -> None:
    vit = fused()
    backbone = backbone_of(build_detector(vit, ["a"], image_size=(64, 64), **SMALL).eval())
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    found = backbone(pixels).feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instances", [False, True])
def test_what_starts_anew_starts_wide_enough_to_learn(instances: bool) -> None:
    """Xavier's uniform rule; transformers' own standard deviation is 0.02 for every shape."""
    model = build_detector(fused(), ["a", "b"], image_size=(32, 32), instances=instances, **SMALL)
    encoder, seen = set(backbone_of(model).modules()), 0
    for name, module in model.named_modules():
        if module in encoder or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        weight = module.weight.detach()
        if "sampling_offsets" in name or "attention_weights" in name or ("bbox_embed" in name and "layers.2" in name):
            assert not weight.any(), name
        elif weight.numel() >= 500:
            inputs, outputs = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
            expected = (2 / (inputs // getattr(module, "groups", 1) + outputs)) ** 0.5
            assert float(weight.std()) == pytest.approx(expected, rel=0.1), name
            seen += 1
        if "class_embed" in name:
            assert module.bias.tolist() == pytest.approx([-math.log(99)] * 2), name  # objects are rare
    assert seen > 10


@pytest.mark.parametrize(
    ("size", "points"), [((32, 32), 64), ((128, 160), 1280), ((192, 192), 1152), ((768, 768), 2304)]
)
def test_masks_of_small_images_are_compared_at_enough_points(size: tuple[int, int], points: int) -> None:
    """1,024 cells or all, up to the sixteenth that RF-DETR takes."""
    model = build_detector(fused(), ["a"], image_size=size, instances=True, num_queries=8, **SMALL)
    stride, share = model.config.mask_downsample_ratio, model.config.mask_point_sample_ratio
    cells = (size[0] // stride) * (size[1] // stride)
    assert cells // share == points >= min(cells, 1024)


def test_windows_of_the_paper_are_another_network() -> None:
    vit = fused(num_hidden_layers=4)
    one, two = (
        backbone_of(build_detector(vit, ["a"], image_size=(32, 32), num_windows=windows, **SMALL).eval())
        for windows in (1, 2)
    )
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert not torch.allclose(one(pixels).feature_maps[-1], two(pixels).feature_maps[-1])


def test_an_oblong_input_trains_every_tensor() -> None:
    vit = fused(image_size=(32, 64)).float()
    model = build_detector(vit, ["a", "b"], image_size=(32, 48), instances=True, **SMALL).train()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.2, 0.2]])
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": boxes, "masks": torch.rand(2, 32, 48) > 0.5},
        {
            "class_labels": torch.zeros(0, dtype=torch.int64),
            "boxes": torch.zeros(0, 4),
            "masks": torch.zeros(0, 32, 48),
        },
    ]
    model(pixel_values=torch.randn(2, 3, 32, 48), labels=labels).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("instances", [False, True])
def test_a_batch_without_objects_has_the_loss_of_the_classes(instances: bool) -> None:
    """The stock loss with masks is then an empty tensor; what it should be is known from the model without masks."""
    model = build_detector(fused().float(), ["a", "b"], image_size=(32, 32), instances=instances, **SMALL).train()
    pixels, config = torch.randn(2, 3, 32, 32), model.config
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    expected = stock_detector(model)(pixel_values=pixels, labels=[nothing] * 2).loss
    model.loss_function = guarded(model.loss_function, config.class_loss_coefficient)
    labels = [{**nothing, "masks": torch.zeros(0, 32, 32)}] * 2
    loss = model(pixel_values=pixels, labels=labels).loss
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()  # DDP waits for the gradient of every tensor
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("size", "groups"), [((32, 32), 2), ((128, 128), 13), ((32, 32), 160)])
def test_matching_takes_as_many_points_as_the_loss_and_not_many_times_more(
    size: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL | {"query_groups": groups}
    model = build_detector(fused().float(), ["a"], image_size=size, instances=True, **small).train()
    model.loss_function = guarded(model.loss_function, model.config.class_loss_coefficient)
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.full((1, 4), 0.5)}
    labels["masks"] = torch.ones(1, *size)
    taken, sample = [], loss_rf_detr.sample_point
    monkeypatch.setattr(
        loss_rf_detr, "sample_point", lambda masks, at, **how: taken.append(at.shape[:2]) or sample(masks, at, **how)
    )
    model(pixel_values=torch.randn(1, 3, *size), labels=[labels])
    rows, cells = model.config.num_queries * groups, (size[0] // 4) * (size[1] // 4)
    wanted = max(rows * 4 // 16, min(cells, rows * 4))  # the stock matcher's for large images; the loss has all cells
    matched = {points for masks, points in taken if masks == rows}
    assert len(matched) == 1 and wanted <= min(matched) < 2 * wanted
    assert {points for masks, points in taken if masks != rows} >= {cells, 3 * cells}  # the loss's, and its candidates


@pytest.mark.parametrize("instances", [False, True])
def test_layers_of_the_backbone_learn_more_slowly_than_the_heads(instances: bool) -> None:
    model = build_detector(fused(), ["a"], image_size=(32, 32), instances=instances, **SMALL)
    groups = parameter_groups(model, 1.0, 0.1, layer_decay=0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    backbone = backbone_of(model)
    inside = {id(parameter) for parameter in backbone.parameters()} - {id(p) for p in backbone.layernorm.parameters()}
    assert {rate[id(p)] for p in backbone.embeddings.parameters()} == {0.125}
    assert [{rate[id(p)] for p in layer.parameters()} for layer in backbone.encoder.layer] == [{0.25}, {0.5}]
    assert {rate[one] for one in rate.keys() - inside} == {1.0}


def test_a_saved_detector_loads_as_what_it_is(tmp_path: Any) -> None:
    model = build_detector(fused().float(), ["a", "b"], image_size=(32, 32), **SMALL).eval()
    model.save_pretrained(tmp_path, save_original_format=False)
    found, content = load_detector(str(tmp_path))
    assert is_detector(content) and type(found) is RfDetrForObjectDetection
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    vit = ViTModel(ViTConfig(**{k: v for k, v in TINY.items() if not k.startswith("decoder")}), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="holds ViTModel, not one of RfDetrForObjectDetection"):
        load_detector(str(tmp_path / "vit"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"image_size": (32, 30)}, "image size 30 is not a multiple of patch size 8"),
        (
            {"num_queries": 17},
            "--num_queries 17: every query starts from a patch, and an image of 32 x 32 pixels has 16",
        ),
        ({"decoder_width": 48}, "--decoder_width 48: give a multiple of 32"),
        ({"num_windows": 3}, "--num_windows 3 does not tile the 4 x 4 patches"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(fused(), ["a"], **({"image_size": (32, 32)} | SMALL | how))
    with pytest.raises(UserError, match="this encoder's 40 is not one of 24"):
        build_detector(fused(intermediate_size=40), ["a"], image_size=(32, 32), **SMALL)
