"""A start from weights made for other images: what is kept, what is adapted, what is refused."""

import pytest
import torch
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from hf_dbp.hub.warm_start import adapted_channels, fits, warm_start_
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, initialize_mae_, stock_fields
from hf_dbp.stock_vit_mae import resampled_positions


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_grey_image_gives_what_it_gave_before(channels):
    weight, grey = torch.randn(7, 3, 4, 4), torch.randn(4, 4)
    adapted = adapted_channels(weight, channels)
    assert adapted.shape == (7, channels, 4, 4)
    torch.testing.assert_close((adapted * grey).sum((1, 2, 3)), (weight * grey).sum((1, 2, 3)), atol=1e-4, rtol=1e-4)
    assert torch.equal(adapted_channels(weight, 3), weight)


def fresh(mae_config, **fields):
    model = DBPViTMAEForPreTraining(mae_config(**({"num_channels": 2, "image_size": 48} | fields)))
    initialize_mae_(model)
    return model


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_vit_mae_for_rgb_serves_two_channels_at_another_size(mae_config, tmp_path, kind):
    stock = ViTMAEConfig(**stock_fields(mae_config(), ViTMAEConfig))
    source = DBPViTMAEForPreTraining(mae_config()) if kind == "ours" else ViTMAEForPreTraining(stock)
    initialize_mae_(source)
    if kind == "ours":  # W R is what counts
        source.vit.layers[0].mlp.fc1.decorrelation.R.mul_(2.0)
    source.save_pretrained(tmp_path)
    model = fresh(mae_config)
    assert not fits(str(tmp_path), model.config) and fits(str(tmp_path), mae_config())
    warm_start_(model, str(tmp_path))
    ours, theirs = model.state_dict(), source.state_dict()
    factor = 2.0 if kind == "ours" else 1.0
    name = "vit.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(ours[name], factor * theirs[name])
    assert torch.equal(model.vit.layers[0].mlp.fc1.decorrelation.R, torch.eye(24))
    assert torch.equal(ours["decoder.decoder_embed.weight"], theirs["decoder.decoder_embed.weight"])
    rows = ours["decoder.decoder_pred.weight"].unflatten(0, (64, 2))
    torch.testing.assert_close(rows[:, 1], theirs["decoder.decoder_pred.weight"].unflatten(0, (64, 3)).mean(1))
    assert torch.equal(ours["vit.embeddings.position_embeddings"], fresh(mae_config).vit.embeddings.position_embeddings)
    assert torch.isfinite(model(torch.randn(2, 2, 48, 48)).loss)


def test_a_vit_gives_its_encoder_and_its_positions_resampled(mae_config, tmp_path):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    config = mae_config()
    vit = ViTModel(ViTConfig(**{name: getattr(config, name) for name in names}, image_size=32), add_pooling_layer=False)
    torch.nn.init.normal_(vit.embeddings.position_embeddings)
    vit.save_pretrained(tmp_path)
    model = fresh(mae_config)
    before = model.decoder.decoder_embed.weight.clone()
    warm_start_(model, str(tmp_path))
    table = model.vit.embeddings.position_embeddings
    assert (
        torch.equal(table, resampled_positions(vit.embeddings.position_embeddings.detach(), (6, 6)))
        and not table.requires_grad
    )
    assert torch.equal(model.decoder.decoder_embed.weight, before)
    assert torch.equal(model.vit.layers[1].mlp.fc2.weight, vit.layers[1].mlp.fc2.weight)


def test_another_patch_or_another_model_is_refused(mae_config, tmp_path):
    source = DBPViTMAEForPreTraining(mae_config())
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has patch_size 8, but the model to train has 16"):
        warm_start_(fresh(mae_config, patch_size=16), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    with pytest.raises(ValueError, match="holds a 'beit' model; give a ViT-MAE or a ViT"):
        warm_start_(fresh(mae_config), str(tmp_path))
