"""A stock EoMT over a stock ViT: the encoder itself, with learned queries, is the segmentation model.

EoMT ("Your ViT is Secretly an Image Segmentation Model", Kerssies et al., 2025) has no decoder. Q learned queries join
the tokens before the last ``num_blocks`` layers. After the last norm each query q gives class probabilities c_q (the K
classes and none) and, with the patch tokens upscaled to a quarter of the image, a mask m_q. Semantic scores are

    p_k = sum over q of softmax(c_q)_k * sigmoid(m_q)

at each pixel, as published, and `SemanticEomt` gives their logarithms as logits: their argmax is that of the scores,
their softmax the scores' shares. Where windows overlap, logits are averaged, so scores by their geometric mean.

`EomtForUniversalSegmentation` has the layers of a DINOv2 (`hf_dbp.downstream.bridge`) under other names, so the ViT's
weights move there: with LayerScale 1 and no register tokens, the tokens before the queries join are the ViT's up to
rounding. Differences, all of them folded into the weights:

- a ViT adds a position to its class token: here the class token is the sum of both;
- queries, keys and values always have biases: zeros for a ViT without them;
- the position table is that of one square input, the crop: it is resampled once, bicubic. The model takes no other
  size.

In training each query attends to its own predicted mask with a probability that falls to 0 (`mask_loss`). Evaluation
and the saved model attend without masks (``attn_mask_probs`` is 0), which is fast and depends on no chance.

Shapes: B images; Q queries; K classes; S side of a crop; h, w height and width of the masks; D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EomtConfig, EomtForUniversalSegmentation, ViTModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_dbp.config_limits import check_fields, check_image_size
from hf_dbp.downstream.beit import sides
from hf_dbp.downstream.bridge import RENAMED, dinov2_fields
from hf_dbp.downstream.networks import load_stock
from hf_dbp.downstream.segmentation.classes import check_names, class_fields
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import check_memory, read_config
from hf_dbp.stock_vit_mae import resampled_positions

__all__ = ["QUERIES", "SemanticEomt", "build_eomt", "load_eomt"]

QUERIES = 100  # published for semantic segmentation
POINTS = 12544  # published: the points of a mask at which the loss compares it
NEW_NAMES = RENAMED | {"o_proj": "out_proj"}


class SemanticEomt(nn.Module):
    """An EoMT that is called like a UperNet.

    Args:
        model: the EoMT, which stays as it is.
    """

    def __init__(self, model: EomtForUniversalSegmentation) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """Logits (B, K, S, S), float32, of crops (B, C, S, S)."""
        output = self.model(pixel_values=pixel_values)
        with torch.autocast(pixel_values.device.type, enabled=False):
            masks_BQSS = nn.functional.interpolate(
                output.masks_queries_logits.float(), pixel_values.shape[2:], mode="bilinear"
            ).sigmoid()
            classes_BQK = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]
            scores_BKSS = torch.einsum("bqk,bqhw->bkhw", classes_BQK, masks_BQSS)
        return SemanticSegmenterOutput(logits=scores_BKSS.clamp(min=torch.finfo(torch.float32).tiny).log())


def build_eomt(
    vit: ViTModel,
    id2label: Mapping[int, str],
    *,
    crop_size: int,
    ignore_index: int = 255,
    num_queries: int = QUERIES,
    num_blocks: int | None = None,
) -> EomtForUniversalSegmentation:
    """An EoMT with new queries and heads over the ViT's weights (copied).

    Args:
        vit: stock ViT of any square patch size and number of channels.
        id2label: class names by id 0..K-1.
        crop_size: side of its input in pixels.
        ignore_index: label id that the loss ignores; not a class id.
        num_queries: queries, each of which can find one class in an image.
        num_blocks: layers that the queries pass; default: a quarter of the layers, at most 4.

    Raises:
        UserError: patches do not tile the crop, there are more classes than queries, fewer layers than the queries are
            to pass, impossible classes, or the ViT cannot be a DINOv2.
    """
    patch, layers = sides(vit.config.patch_size)[0], vit.config.num_hidden_layers
    check_image_size(crop_size, patch)
    blocks = min(4, max(1, layers // 4)) if num_blocks is None else num_blocks
    if not 0 < blocks <= layers:
        raise UserError(f"--num_blocks {blocks}: the queries pass 1 to {layers} layers, all that this encoder has")
    if num_queries < len(id2label):
        raise UserError(f"--num_queries {num_queries}: every class needs one, so give {len(id2label)} or more")
    fields = dinov2_fields(vit.config, "EoMT is one; take another encoder") | {"image_size": crop_size}
    config = EomtConfig(
        **{name: value for name, value in fields.items() if name in EomtConfig.__dataclass_fields__},
        **class_fields(id2label, ignore_index),
        attention_dropout=vit.config.attention_probs_dropout_prob,
        num_register_tokens=0,
        num_queries=num_queries,
        num_blocks=blocks,
        num_upscale_blocks=max(1, int(math.log2(patch)) - 2),  # masks of a quarter of the image
        train_num_points=min(POINTS, crop_size**2),
    )
    model = EomtForUniversalSegmentation(config).to(vit.dtype)
    model.attn_mask_probs.zero_()
    fill(model, vit)
    return model


def fill(model: EomtForUniversalSegmentation, vit: ViTModel) -> None:
    """Load the tensors of a ViT into an EoMT whose LayerScale is 1."""
    state = {name: value for name, value in vit.state_dict().items() if not name.startswith("pooler.")}
    rows, columns = (size // model.config.patch_size for size in sides(vit.config.image_size))
    table = resampled_positions(state.pop("embeddings.position_embeddings"), model.grid_size, (rows, columns))[0]
    state["embeddings.cls_token"] = state["embeddings.cls_token"] + table[0]
    state["embeddings.position_embeddings.weight"] = table[1:]
    named = {".".join(NEW_NAMES.get(part, part) for part in name.split(".")): value for name, value in state.items()}
    if not vit.config.qkv_bias:
        zeros = torch.zeros(model.config.hidden_size, dtype=vit.dtype)
        parts = [f"layers.{k}.attention.{one}_proj.bias" for k in range(len(model.layers)) for one in "qkv"]
        named |= dict.fromkeys(parts, zeros)
    model.load_state_dict(model.state_dict() | named)


def load_eomt(
    source: str, id2label: Mapping[int, str], *, ignore_index: int = 255, **hub_options: Any
) -> EomtForUniversalSegmentation:
    """Load a trained EoMT, ours or a public one, from a folder or the Hub.

    Args:
        source: folder or Hub id.
        id2label: class names of the labels to use it with.
        ignore_index: as in `build_eomt`.
        hub_options: revision, cache_dir, token.

    Raises:
        UserError: it is not one, it has other classes, or `hf_dbp.hub.untrusted` refuses it.
    """
    content = read_config(source, **hub_options)
    file = str(Path(source) / "config.json")
    if content["model_type"] != "eomt":
        raise UserError(f"{file} is not that of an EoMT, as `hf-dbp finetune --head eomt` writes it")
    check_names(content, file, id2label)
    check_fields(content, file)
    check_memory(content, file)
    model = load_stock(EomtForUniversalSegmentation, source, content, "semantic segmentation", **hub_options)
    assert isinstance(model, EomtForUniversalSegmentation)
    model.config.loss_ignore_index = ignore_index
    model.attn_mask_probs.zero_()
    return model
