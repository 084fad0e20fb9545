"""How correlated the inputs of an encoder's layers are, measured the same way for every method (paper Fig. 12).

`measure_correlations` sends a fixed batch through the model and measures z = R x at every layer of the encoder that DBP
can decorrelate, with R = I where the model has none, over all pairs of features, also those in different blocks of a
block-diagonal R. The figures of BP and of every form of DBP are therefore comparable. It does not affect training; call
it while the clock is stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor
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
        batch: pixel_values (B, C, H, W) and noise (B, T), the same every time if curves are to be comparable.

    Returns:
        layer name -> {"decorrelation_loss", "mean_squared_correlation"}, over all tokens of the batch, and with several
        processes over the batches of all of them.
    """
    probe = probing_copy(model).train()
    configure_sampling(probe, RowSampling(fraction=1.0))
    probe(**{key: value.to(model.device) for key, value in batch.items()})
    return correlation_values(measure_decorrelation(probe))


def probing_copy(model: PreTrainedModel) -> DBPViTMAEForPreTraining:
    """The model with its whole encoder decorrelated, sharing its parameters; R = I where it had none."""
    fields = {key: getattr(model.config, key) for key in type(model.config).__dataclass_fields__ if key != "model_type"}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = DBPViTMAEConfig(**(fields | without_dropout | {"decorrelated_layers": "encoder", "wide_blocks": 1}))
    with torch.device("meta"):
        probe = DBPViTMAEForPreTraining(config)
    state = model.state_dict()
    for name, layer in decorrelated_layers(model):
        if layer.decorrelation.R.ndim == 3:
            state[f"{name}.decorrelation.R"] = torch.block_diag(*layer.decorrelation.R)  # type: ignore[no-untyped-call]
    probe.load_state_dict(state, strict=False, assign=True)
    for _, layer in decorrelated_layers(probe):
        if layer.decorrelation.R.is_meta:
            layer.decorrelation.to_empty(device=model.device).reset_parameters()
    absent = [name for name, parameter in probe.named_parameters() if parameter.is_meta]
    assert not absent, f"{type(model).__name__} lacks {absent[0]}"
    return probe


def correlation_values(measured: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """The result of `measure_decorrelation` as numbers by name; synchronises once."""
    if not measured:
        return {}
    values = torch.stack([torch.stack(pair) for pair in measured.values()]).tolist()
    return {
        name: {"decorrelation_loss": loss, "mean_squared_correlation": correlation}
        for name, (loss, correlation) in zip(measured, values, strict=True)
    }


def mean_correlations(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Both figures, averaged over the layers."""
    return {
        key: sum(layer[key] for layer in layers.values()) / len(layers)
        for key in ("decorrelation_loss", "mean_squared_correlation")
    }
