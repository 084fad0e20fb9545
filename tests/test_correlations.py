"""The probe of layer inputs: one yardstick for stock, BP and DBP models, and it leaves no trace."""

import pytest
import torch
from transformers import ViTMAEForPreTraining

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.correlations import mean_correlations, measure_correlations
from hf_dbp.layers import RowSampling
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, initialize_mae_
from hf_dbp.update import configure_sampling, measure_decorrelation


@pytest.fixture
def batch():
    return {"pixel_values": torch.randn(4, 3, 32, 32).cumsum(dim=3), "noise": torch.rand(4, 16)}


def made(model):
    torch.manual_seed(1)
    initialize_mae_(model)
    return model


def test_stock_and_plain_and_undecorrelated_models_measure_alike(mae_config, batch):
    found = [
        measure_correlations(made(DBPViTMAEForPreTraining(mae_config(decorrelated_layers=choice))), batch)
        for choice in ("none", "block_inputs", "encoder", "full")
    ]
    stock = made(ViTMAEForPreTraining(mae_config(decorrelated_layers="none")))
    found.append(measure_correlations(stock, batch))
    names = [f"vit.layers.{n}.{part}" for n in range(2) for part in ("attention", "mlp.fc1", "mlp.fc2")]
    assert set(names) < set(found[0])
    assert all(set(other) == set(found[0]) for other in found)
    for other in found[1:]:
        assert mean_correlations(other) == pytest.approx(mean_correlations(found[0]), rel=1e-5)


def test_blocks_are_measured_over_all_pairs_of_features(mae_config, batch):
    """The same figures as those of a full R with zeros between the blocks."""
    blocks = made(DBPViTMAEForPreTraining(mae_config(decorrelated_layers="full", wide_blocks=4)))
    whole = made(DBPViTMAEForPreTraining(mae_config(decorrelated_layers="full")))
    for (_, one), (_, other) in zip(decorrelated_layers(blocks), decorrelated_layers(whole), strict=True):
        R = one.decorrelation.R
        R.data += 0.1 * torch.randn_like(R)
        other.decorrelation.R.data = torch.block_diag(*R) if R.ndim == 3 else R.data
    assert measure_correlations(blocks, batch) == {
        name: pytest.approx(figures, rel=1e-5) for name, figures in measure_correlations(whole, batch).items()
    }


def test_it_is_what_the_layers_measure_themselves(mae_config, batch):
    """With R other than I, on all tokens of the batch."""
    model = made(DBPViTMAEForPreTraining(mae_config()))
    for _, layer in decorrelated_layers(model):
        layer.decorrelation.R.data += 0.1 * torch.randn_like(layer.decorrelation.R)
    found = measure_correlations(model, batch)
    configure_sampling(model, RowSampling(1.0))
    model.train()(**batch)
    own = {name: tuple(float(value) for value in pair) for name, pair in measure_decorrelation(model).items()}
    assert {name: tuple(layer.values()) for name, layer in found.items()} == {
        name: pytest.approx(pair, rel=1e-5) for name, pair in own.items()
    }


def test_the_model_is_left_as_it_was(mae_config, batch):
    model = made(DBPViTMAEForPreTraining(mae_config())).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    measure_correlations(model, batch)
    assert not any(module.training for module in model.modules())
    assert all(layer.decorrelation.rows is None for _, layer in decorrelated_layers(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
