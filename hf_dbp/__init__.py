"""Masked-autoencoder pre-training of Vision Transformers with decorrelated backpropagation (DBP).

functional                    the maths on tensors
layers, conversion, update    R and the layers that use it; swap and fuse; the step of R
configuration_, modeling_     the ViT-MAE
callbacks, trainer            when R is updated; the Trainer around it
data, recipes, records        images, flags, run.json
pretraining, fusing           the mains of the scripts
"""

from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.configuration_dbp_vit_mae import SIZES, DBPViTMAEConfig
from hf_dbp.conversion import all_linears, convert_to_decorrelated, decorrelated_layers, fuse
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

__version__ = "0.1.0"

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
    "decorrelated_layers",
    "extract_vit",
    "fuse",
    "initialize_mae_",
    "load_fused_vit",
    "measure_decorrelation",
    "seed_sampling",
    "update_decorrelation",
]
