"""The ViT inside the stock EoMT computes what the ViT computes; its logits are the published scores."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import TINY, fused
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    EomtForUniversalSegmentation,
    EomtImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_dbp import DBPViTMAEConfig, DBPViTMAEForPreTraining
from hf_dbp.downstream.beit import parameter_groups
from hf_dbp.downstream.encoder import load_vit
from hf_dbp.downstream.segmentation.eomt import SemanticEomt, build_eomt, load_eomt
from hf_dbp.errors import UserError
from hf_dbp.stock_vit_mae import initialize_mae_

NAMES = {k: f"class {k}" for k in range(3)}
SMALL: dict[str, Any] = {"crop_size": 32, "num_queries": 5}


def assert_tokens_are_the_encoders(model, vit, size=32, **tolerance):
    """Before the queries join, and after the last norm if none joins."""
    pixels = torch.randn(2, vit.config.num_channels, size, size, dtype=vit.dtype)
    with torch.no_grad():
        expected = vit(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        tokens = model.embeddings(pixels)
        for layer, state in zip([None, *model.layers], expected.hidden_states, strict=True):
            tokens = tokens if layer is None else layer(tokens, None)
            torch.testing.assert_close(tokens, state, rtol=0, **tolerance)
        torch.testing.assert_close(model.layernorm(tokens), expected.last_hidden_state, rtol=0, **tolerance)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_channels": 1, "num_hidden_layers": 5},
        {"num_channels": 4, "qkv_bias": False},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2},
    ],
)
def test_before_the_queries_join_the_tokens_are_the_encoders(fields):
    vit = fused(**fields)
    model = build_eomt(vit, NAMES, **SMALL).eval()
    assert type(model) is EomtForUniversalSegmentation and model.config.num_register_tokens == 0
    assert_tokens_are_the_encoders(model, vit, atol=1e-10)
    assert all(bool((layer.layer_scale1.lambda1 == 1).all()) for layer in model.layers)
    with torch.no_grad():  # and what joins are the queries, in front
        joined: list[torch.Tensor] = []
        model.layers[-model.config.num_blocks].register_forward_pre_hook(lambda module, given: joined.append(given[0]))
        pixels = torch.randn(1, vit.config.num_channels, 32, 32, dtype=torch.float64)
        model(pixels)
        states = vit(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(joined[0][:, 5:], states[-1 - model.config.num_blocks], rtol=0, atol=1e-10)
    assert torch.equal(joined[0][0, :5], model.query.weight)


@pytest.mark.parametrize(("size", "crop"), [(32, 64), ((32, 64), 64), (64, 24)])
def test_at_another_size_the_positions_are_those_that_the_vit_resamples(size, crop):
    vit = fused(image_size=size)
    model = build_eomt(vit, NAMES, crop_size=crop, num_queries=5).eval()
    table = model.embeddings.position_embeddings.weight
    assert table.shape == ((crop // 8) ** 2, 24)
    if isinstance(size, int):
        assert_tokens_are_the_encoders(model, vit, crop, atol=1e-5)
        return
    own = vit.embeddings.position_embeddings[:, 1:].reshape(1, 4, 8, 24).movedim(3, 1)  # a rectangle
    square = nn.functional.interpolate(own, (8, 8), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(table, square, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_mae", "dbp_vit_mae", "dinov2"])
def test_other_starts_are_read_as_for_every_task(tmp_path, kind):
    if kind == "dinov2":
        shape = {name: value for name, value in TINY.items() if "decoder" not in name and name != "intermediate_size"}
        start: Any = Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, layerscale_value=0.3))
        for layer in start.encoder.layer:
            nn.init.normal_(layer.layer_scale1.lambda1)
    elif kind == "vit_mae":
        start = ViTMAEForPreTraining(ViTMAEConfig(**TINY))
        initialize_mae_(start)
    else:
        start = DBPViTMAEForPreTraining(DBPViTMAEConfig(**TINY))
        initialize_mae_(start)
    start.save_pretrained(tmp_path)
    vit = load_vit(str(tmp_path)).double().eval()
    assert_tokens_are_the_encoders(build_eomt(vit, NAMES, **SMALL).eval(), vit, atol=1e-10)


@pytest.fixture(scope="module")
def small():
    """An EoMT with everything that is new drawn large, so that scores differ."""
    torch.manual_seed(0)
    model = build_eomt(fused().float(), NAMES, **SMALL).eval()
    with torch.no_grad():
        for parameter in (model.query.weight, model.class_predictor.weight, model.mask_head.fc3.weight):
            parameter.mul_(20)
    return model


def test_logits_are_the_logarithms_of_the_published_scores(small):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output, logits = small(pixels), SemanticEomt(small)(pixels).logits
    masks = nn.functional.interpolate(output.masks_queries_logits, (32, 32), mode="bilinear").sigmoid()
    classes = output.class_queries_logits.softmax(-1)
    scores = torch.stack([sum(masks[:, q] * classes[:, q, k, None, None] for q in range(5)) for k in range(3)], dim=1)
    torch.testing.assert_close(logits.exp(), scores, rtol=1e-4, atol=1e-6)
    processor = EomtImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32})
    stock = torch.stack(processor.post_process_semantic_segmentation(output, target_sizes=[(32, 32)] * 2))
    assert (stock == logits.argmax(1)).float().mean() > 0.999
    assert len(stock.unique()) > 1


def test_autocast_leaves_the_scores_their_precision(small):
    """The network may run in bfloat16; scores that differ by less must not become equal."""
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = SemanticEomt(small)(pixels).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert not torch.equal(logits, logits.to(torch.bfloat16).float())
    assert not torch.equal(logits.exp(), logits.exp().to(torch.bfloat16).float())


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_parameter_groups_cover_every_parameter_once(layer_decay):
    model = build_eomt(fused(), NAMES, **SMALL)
    groups = parameter_groups(model, 1.0, 0.05, layer_decay)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rates) == len(list(model.parameters()))
    expected = {
        "embeddings.cls_token": (layer_decay**3, 0.0),
        "embeddings.position_embeddings.weight": (layer_decay**3, 0.0),
        "embeddings.patch_embeddings.projection.weight": (layer_decay**3, 0.05),
        "layers.0.mlp.fc1.weight": (layer_decay**2, 0.05),
        "layers.1.mlp.fc1.weight": (layer_decay, 0.05),
        "layers.1.layer_scale1.lambda1": (layer_decay, 0.0),
        "query.weight": (1.0, 0.05),
        "layernorm.weight": (1.0, 0.0),
        "mask_head.fc1.weight": (1.0, 0.05),
    }
    parameters = dict(model.named_parameters())
    assert {name: rates[id(parameters[name])] for name in expected} == expected


@pytest.mark.parametrize(
    ("layers", "given", "blocks"),
    [(2, None, 1), (5, None, 1), (12, None, 3), pytest.param(24, None, 4, marks=pytest.mark.slow), (4, 4, 4)],
)
def test_queries_pass_a_quarter_of_the_layers(layers, given, blocks):
    model = build_eomt(fused(num_hidden_layers=layers), NAMES, num_blocks=given, **SMALL)
    assert (model.config.num_blocks, len(model.attn_mask_probs)) == (blocks, blocks)


@pytest.mark.parametrize(("patch", "stride"), [(4, 2), (8, 4), (16, 4), (32, 4)])
def test_masks_have_a_quarter_of_the_image(patch, stride):
    model = build_eomt(fused(patch_size=patch), NAMES, **SMALL).eval()
    with torch.no_grad():
        masks = model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).masks_queries_logits
    assert masks.shape == (1, 5, 32 // stride, 32 // stride)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"crop_size": 30}, "image size 30 is not a multiple of patch size 8"),
        ({"num_queries": 2}, "--num_queries 2: every class needs one, so give 3 or more"),
        ({"num_blocks": 3}, "--num_blocks 3: the queries pass 1 to 2 layers"),
        ({"num_blocks": 0}, "--num_blocks 0: the queries pass 1 to 2 layers"),
        ({"ignore_index": 2}, "ignore_index 2 is the class 'class 2'"),
        ({"id2label": {0: "a"}}, "at least two"),
    ],
)
def test_what_cannot_be_built_is_refused(how, message):
    with pytest.raises(UserError, match=message):
        build_eomt(fused(), **({"id2label": NAMES} | SMALL | how))
    with pytest.raises(UserError, match="this encoder's 40 is not one of 24"):
        build_eomt(fused(intermediate_size=40), NAMES, **SMALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "upernet"}, "is not that of an EoMT"),
        ({"hidden_size": -1}, "hidden_size is -1; expected"),
        ({"id2label": {"0": "a", "1": "b"}}, "has the classes .*'a'.*give those of its training"),
        ({"num_queries": 6}, r"has shape \[.*\] in its weights but"),
        ({"num_hidden_layers": 3}, "lacks 18 tensors of the model"),
    ],
)
def test_a_saved_eomt_loads_as_what_it_is(small, tmp_path, changed, message):
    small.save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"quantization_config": {"quant_method": "none such"}}))
    loaded = load_eomt(str(tmp_path), NAMES).eval()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in small.state_dict().items())
    assert (loaded.attn_mask_probs == 0).all()
    file.write_text(json.dumps(content | changed))
    with pytest.raises(UserError, match=message):
        load_eomt(str(tmp_path), NAMES)


@pytest.mark.slow
def test_saved_model_loads_where_hf_dbp_cannot_be_imported(small, tmp_path):
    small.save_pretrained(tmp_path, save_original_format=False)
    pixels = torch.randn(1, 3, 32, 32)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import sys; sys.modules['hf_dbp'] = None\n"
        "import torch; from transformers import AutoModelForUniversalSegmentation\n"
        f"model = AutoModelForUniversalSegmentation.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"output = model(torch.load({str(tmp_path / 'pixels.pt')!r}))\n"
        f"torch.save((output.masks_queries_logits, output.class_queries_logits), {str(tmp_path / 'found.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    masks, classes = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        output = small(pixels)
    torch.testing.assert_close(masks, output.masks_queries_logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(classes, output.class_queries_logits, rtol=1e-5, atol=1e-4)
