"""How correlated the inputs of an encoder's layers are, by one yardstick for every method (paper Fig. 12).

`measure_correlations` lets a fixed batch through the model and measures z = R x at every layer that DBP can decorrelate
in the encoder, with R = I where the model has none: BP and DBP, and DBP on fewer layers, give comparable figures. It
takes no part in training and is meant to run while the clock stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.layers import RowSampling
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.update import configure_sampling, measure_decorrelation

__all__ = ["correlation_values", "mean_correlations", "measure_correlations"]


@torch.no_grad()
def measure_correlations(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Decorrelation loss and mean squared correlation of every layer input of the encoder.

    Args:
        model: a ViT-MAE, stock or ours, decorrelated or not; it is not changed.
        batch: pixel_values (B, C, H, W) and noise (B, T), always the same for curves that compare.

    Returns:
        layer name -> {"decorrelation_loss", "mean_squared_correlation"}, over all tokens of the batch; in every process
        over the batches of all of them.
    """
    probe = probing_copy(model).train()
    configure_sampling(probe, RowSampling(fraction=1.0))
    probe(**{key: value.to(model.device) for key, value in batch.items()})
    return correlation_values(measure_decorrelation(probe))


def probing_copy(model: PreTrainedModel) -> DBPViTMAEForPreTraining:
    """The model as one whose whole encoder is decorrelated, sharing the parameters; R = I where there was none."""
    fields = {key: getattr(model.config, key) for key in type(model.config).__dataclass_fields__ if key != "model_type"}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = DBPViTMAEConfig(**(fields | without_dropout | {"decorrelated_layers": "encoder"}))
    with torch.device("meta"):
        probe = DBPViTMAEForPreTraining(config)
    probe.load_state_dict(model.state_dict(), strict=False, assign=True)
    for _, layer in decorrelated_layers(probe):
        if layer.decorrelation.R.is_meta:
            eye = torch.eye(layer.decorrelation.num_features, device=model.device)
            layer.decorrelation.R = nn.Parameter(eye, requires_grad=False)
    absent = [name for name, parameter in probe.named_parameters() if parameter.is_meta]
    assert not absent, f"{type(model).__name__} lacks {absent[0]}"
    return probe


def correlation_values(measured: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """What `measure_decorrelation` found, as numbers by name; one synchronisation."""
    if not measured:
        return {}
    values = torch.stack([torch.stack(pair) for pair in measured.values()]).tolist()
    return {
        name: {"decorrelation_loss": loss, "mean_squared_correlation": correlation}
        for name, (loss, correlation) in zip(measured, values, strict=True)
    }


def mean_correlations(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """The two figures averaged over the layers."""
    return {
        key: sum(layer[key] for layer in layers.values()) / len(layers)
        for key in ("decorrelation_loss", "mean_squared_correlation")
    }
