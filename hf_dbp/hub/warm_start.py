"""Start from weights made for other images, such as public ViT-MAE or ViT checkpoints for RGB at 224 pixels.

Tensors that fit are copied. Those that depend on the images are adapted, from C0 channels to C:

    patch projection   W'[:, c] = (C0 / C) * mean over c0 of W[:, c0]     a grey image gives the same result as before
    decoder's output   the rows of every channel become their mean over c0
    positions          MAE's fixed sin-cos tables are recomputed for the grid of patches; a ViT's learned table is
                       resampled to it (bicubic) and stays fixed

For a decorrelated checkpoint, W R replaces (W, R), and every R starts at the identity again. A ViT has no decoder, so
the decoder starts from its initialisation. The patch size must be the same.

Shapes: D hidden size; C channels; p patch size; T patches.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTMAEConfig

from hf_dbp.conversion import decorrelated_layers, fuse
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import KINDS, load_model, read_config
from hf_dbp.stock_vit_mae import patch_grid, resampled_positions

__all__ = ["adapted_channels", "fits", "warm_start_"]

logger = logging.getLogger(__name__)


def fits(source: str, config: ViTMAEConfig, **hub: Any) -> bool:
    """Whether the model's class can load the public checkpoint unchanged: a ViT-MAE with the same channels and image
    size.

    A stock class cannot read our checkpoints.
    """
    raw = read_config(source, **hub)
    theirs = raw.get("num_channels", 3), raw.get("image_size", 224)
    return raw["model_type"] in ("vit_mae", config.model_type) and theirs == (config.num_channels, config.image_size)


@torch.no_grad()
def warm_start_(model: PreTrainedModel, source: str, **hub: Any) -> None:
    """Copy a checkpoint's weights into a new ViT-MAE, adapted as described above.

    Args:
        model: the initialised model; its patch projection may be decorrelated.
        source: folder or Hub id of a ViT-MAE, ours or stock, or of a ViT.
        hub: revision, token, cache_dir.

    Raises:
        UserError: patch size or width differ, or `hf_dbp.hub.untrusted` refuses the checkpoint.
    """
    kind = read_config(source, **hub)["model_type"]
    if kind not in KINDS:
        raise UserError(f"--model_name_or_path {source} holds a {kind!r} model; give a ViT-MAE or a ViT")
    plain: nn.Module = load_model(source, *KINDS, **hub, **({"add_pooling_layer": False} if kind == "vit" else {}))
    if any(True for _ in decorrelated_layers(plain)):
        plain = fuse(plain)
    prefix = "vit." if kind == "vit" else ""
    state = {prefix + name: value for name, value in plain.state_dict().items()}
    target = model.state_dict()
    theirs, config = getattr(plain, "config"), model.config  # noqa: B009
    for name in ("patch_size", "hidden_size", "num_hidden_layers"):
        if getattr(theirs, name) != getattr(config, name):
            raise UserError(
                f"--model_name_or_path {source} has {name} {getattr(theirs, name)}, but the model to train has "
                f"{getattr(config, name)}; leave out the flag that changes it"
            )
    _adapt_(state, target, config, theirs.num_channels, learned_positions=kind == "vit")
    wrong = [name for name in state.keys() & target.keys() if state[name].shape != target[name].shape]
    if wrong:
        raise UserError(
            f"--model_name_or_path {source}: {sorted(wrong)[0]} has another shape than in the model to train"
        )
    model.load_state_dict(state, strict=False)
    fresh = {name.split(".")[0] for name in target.keys() - state.keys() if not name.endswith(".R")}
    logger.warning(
        "%s is a %s for %d channels at %s pixels, adapted to %d channels at %s pixels%s",
        source, kind, theirs.num_channels, theirs.image_size, config.num_channels, config.image_size,
        f"; {', '.join(sorted(fresh))} starts from its initialisation" if fresh else "",
    )  # fmt: skip


def _adapt_(
    state: dict[str, Tensor], target: dict[str, Tensor], config: ViTMAEConfig, channels: int, *, learned_positions: bool
) -> None:
    """Adapt the tensors in ``state`` that depend on the images to the shapes of ``target``."""
    projection = "vit.embeddings.patch_embeddings.projection.weight"
    state[projection] = adapted_channels(state[projection], config.num_channels)
    for name in ("decoder.decoder_pred.weight", "decoder.decoder_pred.bias"):
        if name in state:
            rows = state[name].reshape(-1, channels, *state[name].shape[1:]).mean(dim=1)  # (p * p, ...)
            same = config.num_channels == channels
            state[name] = state[name] if same else rows.repeat_interleave(config.num_channels, dim=0)
    table = "vit.embeddings.position_embeddings"
    if learned_positions and state[table].shape != target[table].shape:
        state[table] = resampled_positions(state[table], patch_grid(config))
    for name in (table, "decoder.decoder_pos_embed"):
        if name in state and state[name].shape != target[name].shape:
            state[name] = target[name]


def adapted_channels(weight_DCpp: Tensor, channels: int) -> Tensor:
    """A patch projection (D, C0, p, p) adapted to another number of channels; unchanged for the same number."""
    own = weight_DCpp.shape[1]
    if own == channels:
        return weight_DCpp
    return weight_DCpp.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1) * (own / channels)
