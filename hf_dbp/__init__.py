"""Masked-autoencoder pre-training of Vision Transformers with decorrelated backpropagation (DBP).

functional                    the maths on tensors
layers, conversion, update    R and the layers that use it; swap and fuse; the step of R
any_model, probing, sharing, padding    the same for any torch model, in two lines
configuration_, modeling_     the ViT-MAE
callbacks, training           when R is updated; the Trainer around it
pretraining, fusing, cli      from flags to a folder; from a run to a stock ViT; `hf-dbp`
data, recipes, records        images, flags, run.json
downstream, inspection, comparison, hub    use an encoder, describe a folder, compare methods, publish a model

Importing the package imports nothing else: a public name is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_dbp import _moved

if TYPE_CHECKING:
    from hf_dbp.any_model import decorrelate, survey_layers
    from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
    from hf_dbp.configuration_dbp_vit_mae import SIZES, DBPViTMAEConfig
    from hf_dbp.conversion import all_linears, convert_to_decorrelated, decorrelated_layers, fuse
    from hf_dbp.downstream.bridge import extract_dinov2
    from hf_dbp.downstream.predicting import load_predictor, predict
    from hf_dbp.layers import DecorrelatedLinear, DecorrelatedPatchProjection, Decorrelation, RowSampling
    from hf_dbp.modeling_dbp_vit_mae import (
        DBPViTMAEForPreTraining,
        DBPViTMAEModel,
        extract_vit,
        initialize_mae_,
    )
    from hf_dbp.training.checkpoints import load_fused_vit
    from hf_dbp.training.resuming import ResumingTrainer
    from hf_dbp.update import configure_sampling, measure_decorrelation, seed_sampling, update_decorrelation

__version__ = "0.2.0.dev0"

__all__ = [
    "SIZES",
    "DBPViTMAEConfig",
    "DBPViTMAEForPreTraining",
    "DBPViTMAEModel",
    "DecorrelatedLinear",
    "DecorrelatedPatchProjection",
    "Decorrelation",
    "DecorrelationArguments",
    "DecorrelationCallback",
    "ResumingTrainer",
    "RowSampling",
    "all_linears",
    "configure_sampling",
    "convert_to_decorrelated",
    "decorrelate",
    "decorrelated_layers",
    "extract_dinov2",
    "extract_vit",
    "fuse",
    "initialize_mae_",
    "load_fused_vit",
    "load_predictor",
    "measure_decorrelation",
    "predict",
    "seed_sampling",
    "survey_layers",
    "update_decorrelation",
]

_MODULES = {
    "any_model": ("decorrelate", "survey_layers"),
    "callbacks": ("DecorrelationArguments", "DecorrelationCallback"),
    "configuration_dbp_vit_mae": ("SIZES", "DBPViTMAEConfig"),
    "conversion": ("all_linears", "convert_to_decorrelated", "decorrelated_layers", "fuse"),
    "downstream.bridge": ("extract_dinov2",),
    "downstream.predicting": ("load_predictor", "predict"),
    "layers": ("DecorrelatedLinear", "DecorrelatedPatchProjection", "Decorrelation", "RowSampling"),
    "modeling_dbp_vit_mae": ("DBPViTMAEForPreTraining", "DBPViTMAEModel", "extract_vit", "initialize_mae_"),
    "training.checkpoints": ("load_fused_vit",),
    "training.resuming": ("ResumingTrainer",),
    "update": ("configure_sampling", "measure_decorrelation", "seed_sampling", "update_decorrelation"),
}
_SOURCES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

_moved.install()


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_SOURCES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
