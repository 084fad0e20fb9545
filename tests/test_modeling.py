"""The ViT-MAE classes: initialisation, equality with transformers' own, rectangles, attention forms, fusion."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import checkpoint_activations
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from hf_dbp.configuration_dbp_vit_mae import SIZES, DBPViTMAEConfig
from hf_dbp.conversion import decorrelated_layers, fuse
from hf_dbp.layers import RowSampling
from hf_dbp.modeling_dbp_vit_mae import (
    DBPViTMAEForPreTraining,
    DBPViTMAEModel,
    RectangularViTMAE,
    extract_vit,
    initialize_mae_,
)
from hf_dbp.update import configure_sampling, update_decorrelation

Maker = Callable[..., DBPViTMAEConfig]


def batch(config: ViTMAEConfig, size: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Images and the noise that fixes their masks."""
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    patches = height * width // config.patch_size**2
    return {
        "pixel_values": torch.randn(size, config.num_channels, height, width, dtype=dtype),
        "noise": torch.rand(size, patches),
    }


def perturbed(model: DBPViTMAEForPreTraining) -> DBPViTMAEForPreTraining:
    """The model in float64 with every R away from the identity."""
    model.double()
    for _, layer in decorrelated_layers(model):
        layer.decorrelation.R.add_(0.05 * torch.randn_like(layer.decorrelation.R))
    return model


def stock_of(config: DBPViTMAEConfig) -> ViTMAEForPreTraining:
    """transformers' class, correctly initialised."""
    fields = {k: v for k, v in config.to_dict().items() if k in ViTMAEConfig.__dataclass_fields__ and k != "model_type"}
    stock = (ViTMAEForPreTraining if isinstance(config.image_size, int) else RectangularViTMAE)(ViTMAEConfig(**fields))
    initialize_mae_(stock)
    return stock


def he_et_al_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """The table of the published MAE: for token (row, column), [sin, cos] of its column, then of its row, after zeros.

    Angles are position / 10000^(2 i / (width / 2)) for i = 0 .. width / 4 - 1.
    """
    quarter = width // 4
    table = np.zeros((1 + grid[0] * grid[1], width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                frequency = 10000 ** (-2 * i / (width / 2))
                token = table[1 + row * grid[1] + column]
                token[i], token[quarter + i] = np.sin(column * frequency), np.cos(column * frequency)
                token[2 * quarter + i], token[3 * quarter + i] = np.sin(row * frequency), np.cos(row * frequency)
    return table


@pytest.mark.parametrize("image_size", [32, (16, 40)])
@pytest.mark.parametrize("make", [stock_of, DBPViTMAEForPreTraining])
def test_position_tables_are_the_published_ones_and_frozen(mae_config: Maker, make, image_size) -> None:
    model = make(mae_config(image_size=image_size))
    grid = (4, 4) if image_size == 32 else (2, 5)
    tables = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    for table, width in zip(tables, (24, 16), strict=True):
        np.testing.assert_allclose(table[0].numpy(), he_et_al_table(width, grid), atol=1e-6)
        assert not table.requires_grad


@pytest.mark.parametrize("make", [DBPViTMAEForPreTraining, DBPViTMAEModel, stock_of])
def test_every_other_weight_is_drawn_as_published(mae_config: Maker, make) -> None:
    """Xavier-uniform matrices and patch kernel within their bound, normal(0.02) tokens, zero biases, unit norms."""
    model = make(mae_config(hidden_size=96, intermediate_size=192, decoder_hidden_size=96))
    for name, parameter in model.state_dict().items():
        if "token" in name:
            assert 0.01 < parameter.std() < 0.03, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("weight"):
            fan_out, fan_in = parameter.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert parameter.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
        elif name.endswith("R"):
            assert torch.equal(parameter, torch.eye(len(parameter))), name
        else:
            assert "pos" in name, name


@pytest.mark.parametrize("choice", ["none", "encoder"])
def test_one_seed_draws_the_same_weights_for_every_method(mae_config: Maker, choice: str) -> None:
    torch.manual_seed(5)
    stock = stock_of(mae_config())
    ours = DBPViTMAEForPreTraining(mae_config(decorrelated_layers=choice))
    torch.manual_seed(6)
    initialize_mae_(stock)
    torch.manual_seed(6)
    initialize_mae_(ours)
    state = {name: value for name, value in ours.state_dict().items() if not name.endswith(".R")}
    assert state.keys() == stock.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())


@pytest.mark.parametrize("image_size", [32, (16, 40)])
@pytest.mark.parametrize("choice", ["none", "block_inputs", "encoder", "full"])
def test_a_fresh_model_is_the_stock_model_in_outputs_and_gradients(mae_config: Maker, choice: str, image_size) -> None:
    config = mae_config(decorrelated_layers=choice, image_size=image_size, num_channels=2)
    stock, ours = stock_of(config).double(), DBPViTMAEForPreTraining(config).double()
    ours.load_state_dict(stock.state_dict(), strict=False)
    inputs = batch(config, dtype=torch.float64)
    results = [model.train()(**inputs) for model in (stock, ours)]
    for name in ("loss", "logits", "mask", "ids_restore"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-12, atol=1e-12)
    for result in results:
        result.loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (stock, ours)]
    assert gradients[0].keys() == gradients[1].keys()
    assert not any(name.endswith("R") for name in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "encoder", "decoder"),
    [
        ("none", [], []),
        ("block_inputs", ["attention", "mlp.fc1"], []),
        ("encoder", ["attention", "attention.o_proj", "mlp.fc1", "mlp.fc2"], []),
        ("full", *(2 * [["attention", "attention.o_proj", "mlp.fc1", "mlp.fc2"]])),
    ],
)
def test_what_is_decorrelated(mae_config: Maker, choice: str, encoder: list[str], decoder: list[str]) -> None:
    model = DBPViTMAEForPreTraining(mae_config(decorrelated_layers=choice))
    expected = [f"vit.layers.{i}.{leaf}" for i in range(2) for leaf in encoder]
    expected += ["vit.embeddings.patch_embeddings.projection"] * bool(encoder)
    expected += [f"decoder.decoder_layers.0.{leaf}" for leaf in decoder]
    expected += ["decoder.decoder_embed", "decoder.decoder_pred"] * bool(decoder)
    assert sorted(name for name, _ in decorrelated_layers(model)) == sorted(expected)
    for part, leaves in ((model.vit, encoder), (model.decoder.decoder_layers, decoder)):  # blocks alike print as one
        count = str(part).count("(decorrelation): Decorrelation(R=")
        assert count == len(leaves) + (part is model.vit and bool(leaves))


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_fresh_model_gives_the_outputs_of_plain_backprop_to_the_bit_under_autocast(
    mae_config: Maker, blocks: int
) -> None:
    plain = DBPViTMAEForPreTraining(mae_config(decorrelated_layers="none"))
    ours = DBPViTMAEForPreTraining(mae_config(decorrelated_layers="full", wide_blocks=blocks))
    ours.load_state_dict(plain.state_dict(), strict=False)
    inputs = batch(plain.config)
    with torch.autocast("cpu", torch.bfloat16):
        results = [model.train()(**inputs) for model in (plain, ours)]
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].logits, results[1].logits)


def test_only_the_second_linear_of_every_mlp_has_blocks(mae_config: Maker) -> None:
    model = DBPViTMAEForPreTraining(mae_config(decorrelated_layers="full", wide_blocks=4))
    shapes = {name: tuple(layer.decorrelation.R.shape) for name, layer in decorrelated_layers(model)}
    wide = {f"vit.layers.{i}.mlp.fc2": (4, 12, 12) for i in range(2)} | {"decoder.decoder_layers.0.mlp.fc2": (4, 8, 8)}
    assert {name: shape for name, shape in shapes.items() if len(shape) == 3} == wide


@pytest.mark.parametrize(("choice", "blocks"), [("encoder", 1), ("full", 1), ("full", 4)])
def test_fused_and_naive_forms_agree(mae_config: Maker, choice: str, blocks: int) -> None:
    fields = {"decorrelated_layers": choice, "wide_blocks": blocks}
    fused = perturbed(DBPViTMAEForPreTraining(mae_config(**fields)))
    naive = DBPViTMAEForPreTraining(mae_config(**fields, naive_decorrelation=True)).double()
    naive.load_state_dict(fused.state_dict())
    inputs = batch(fused.config, dtype=torch.float64)
    losses = [model.train()(**inputs).loss for model in (fused, naive)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (fused, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("image_size", [32, (16, 40)])
@pytest.mark.parametrize(("choice", "blocks"), [("none", 1), ("encoder", 1), ("full", 1), ("full", 4)])
def test_fusion_gives_a_stock_model_that_agrees(mae_config: Maker, choice: str, blocks: int, image_size) -> None:
    fields = {"decorrelated_layers": choice, "wide_blocks": blocks, "image_size": image_size}
    config = mae_config(**fields, num_channels=2, norm_pix_loss=True)
    model = perturbed(DBPViTMAEForPreTraining(config)).eval()
    stock, inputs = fuse(model), batch(config, dtype=torch.float64)
    assert type(stock) is (ViTMAEForPreTraining if image_size == 32 else RectangularViTMAE)
    assert type(stock.config) is ViTMAEConfig
    assert "dbp" not in str(stock.config).lower()
    ours, theirs = model(**inputs), stock(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-10, atol=1e-10)
    encoder = fuse(model.vit)
    assert type(encoder) is ViTMAEModel
    torch.testing.assert_close(
        encoder(**inputs).last_hidden_state, model.vit(**inputs).last_hidden_state, rtol=1e-10, atol=1e-10
    )


def every_token(vit: ViTMAEModel, pixels: Tensor) -> Tensor:
    """The encoder's output without masking, tokens in the order of the image."""
    vit.config.mask_ratio = 0.0
    patches = pixels.shape[2] * pixels.shape[3] // vit.config.patch_size**2
    return vit(pixels, noise=torch.arange(patches).expand(len(pixels), -1).double()).last_hidden_state


@pytest.mark.parametrize(("method", "blocks"), [("stock", 1), ("none", 1), ("encoder", 1), ("full", 1), ("full", 4)])
@pytest.mark.parametrize("image_size", [32, (16, 40)])
def test_the_extracted_encoder_is_a_stock_vit_that_agrees(mae_config: Maker, method: str, blocks, image_size) -> None:
    layers = "encoder" if method == "stock" else method
    config = mae_config(image_size=image_size, decorrelated_layers=layers, wide_blocks=blocks)
    mae = stock_of(config).double() if method == "stock" else perturbed(DBPViTMAEForPreTraining(config))
    vit, pixels = extract_vit(mae.eval()), batch(config, dtype=torch.float64)["pixel_values"]
    assert type(vit) is ViTModel
    assert not vit.training
    torch.testing.assert_close(vit(pixels).last_hidden_state, every_token(mae.vit, pixels), rtol=1e-10, atol=1e-10)
    assert extract_vit(mae.vit).state_dict().keys() == vit.state_dict().keys()


def test_extraction_refuses_other_models(mae_config: Maker) -> None:
    with pytest.raises(ValueError, match="expected a ViT-MAE model, got Linear"):
        extract_vit(torch.nn.Linear(2, 2))
    model = DBPViTMAEForPreTraining(mae_config())
    model.vit.layers[1].attention.decorrelation.R[0, 0] = torch.inf
    for call in (fuse, extract_vit):
        with pytest.raises(ValueError, match=r"layers\.1\.attention: .*non-finite"):
            call(model)


def test_attention_implementations_agree_and_outputs_are_recorded(mae_config: Maker) -> None:
    config = mae_config()
    ours, stock = perturbed(DBPViTMAEForPreTraining(config)).eval(), stock_of(config).double().eval()
    inputs = batch(config, dtype=torch.float64)
    by_sdpa = ours(**inputs).logits
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    outputs = [model(**inputs, output_attentions=True, output_hidden_states=True) for model in (ours, stock)]
    torch.testing.assert_close(outputs[0].logits, by_sdpa, rtol=1e-4, atol=1e-5)  # eager: softmax in float32
    for name in ("attentions", "hidden_states"):
        assert [t.shape for t in outputs[0][name]] == [t.shape for t in outputs[1][name]]
    assert len(outputs[0].attentions) == 2
    torch.testing.assert_close(
        outputs[0].attentions[0].sum(-1), torch.ones(3, 2, 5, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_counts_rows_once(mae_config: Maker, reentrant: bool) -> None:
    plain = DBPViTMAEForPreTraining(mae_config(decorrelated_layers="full")).train()
    configure_sampling(plain, RowSampling(fraction=1.0))
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed, use_reentrant=reentrant)
    inputs = batch(plain.config)
    for model in (plain, checkpointed):
        model(**inputs).loss.backward()
    assert any(module.gradient_checkpointing for module in checkpointed.vit.layers)
    for (name, ours), (_, theirs) in zip(decorrelated_layers(plain), decorrelated_layers(checkpointed), strict=True):
        assert torch.equal(ours.decorrelation.rows, theirs.decorrelation.rows), name
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_eight_micro_batches_of_one_are_one_of_eight(mae_config: Maker) -> None:
    whole = DBPViTMAEForPreTraining(mae_config()).double().train()
    configure_sampling(whole, RowSampling(fraction=1.0))
    split = copy.deepcopy(whole)
    inputs = batch(whole.config, size=8, dtype=torch.float64)
    whole(**inputs).loss.backward()
    for i in range(8):
        loss = split(**{name: value[i : i + 1] for name, value in inputs.items()}).loss
        (loss / 8).backward()
    for model in (whole, split):
        update_decorrelation(model, eta=0.01)
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_bf16_autocast_stays_close_and_keeps_R_and_the_gradients_float32(mae_config: Maker) -> None:
    model = perturbed(DBPViTMAEForPreTraining(mae_config())).float().train()
    inputs = batch(model.config)
    exact = model(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs).loss
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    rounded.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    before = [layer.decorrelation.R.clone() for _, layer in decorrelated_layers(model)]
    update_decorrelation(model, eta=1e-4)
    for old, (_, layer) in zip(before, decorrelated_layers(model), strict=True):
        assert layer.decorrelation.R.dtype == torch.float32
        assert not torch.equal(old, layer.decorrelation.R)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"decorrelated_layers": "some"},
            "decorrelated_layers is 'some'; expected one of encoder, block_inputs, full, none",
        ),
        ({"wide_blocks": 5}, "wide_blocks is 5; expected a divisor of intermediate_size, 48"),
        (
            {"wide_blocks": 3, "decorrelated_layers": "full"},
            "wide_blocks is 3; expected a divisor of decoder_intermediate_size, 32",
        ),
        ({"image_size": 30}, "image size 30 is not a multiple of patch size 8; use 24 or 32"),
        ({"image_size": (32, 36)}, "image size 36 is not a multiple of patch size 8; use 32 or 40"),
        ({"image_size": 4}, "use 8"),
        ({"patch_size": 0}, "patch_size is 0; expected a whole number from 1 to 4096"),
    ],
)
def test_configurations_are_checked(mae_config: Maker, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mae_config(**fields)


def test_wrong_inputs_and_widths_are_refused(mae_config: Maker) -> None:
    model = DBPViTMAEForPreTraining(mae_config())
    with pytest.raises(ValueError, match="Expected 3 but got 2"):
        model(torch.randn(1, 2, 32, 32))
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        DBPViTMAEForPreTraining(mae_config(hidden_size=18))


def test_named_sizes_are_the_published_widths() -> None:
    shapes = {name: DBPViTMAEConfig(**fields) for name, fields in SIZES.items()}
    assert {name: (c.num_hidden_layers, c.hidden_size, c.num_attention_heads) for name, c in shapes.items()} == {
        "mini": (4, 128, 4),
        "tiny": (12, 192, 3),
        "small": (12, 384, 6),
        "base": (12, 768, 12),
        "large": (24, 1024, 16),
    }
    assert all(c.intermediate_size == 4 * c.hidden_size for c in shapes.values())
    assert all(c.decoder_num_hidden_layers == 2 for c in shapes.values())


def test_the_encoder_alone_is_a_model_of_its_own(mae_config: Maker) -> None:
    encoder = DBPViTMAEModel(mae_config(decorrelated_layers="none"))
    assert encoder(torch.randn(2, 3, 32, 32)).last_hidden_state.shape == (2, 5, 24)
