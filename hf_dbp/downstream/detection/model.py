"""A stock RF-DETR over a ViT: `RfDetrForObjectDetection`, or with masks `RfDetrForInstanceSegmentation`.

RF-DETR's backbone is a DINOv2 (`hf_dbp.downstream.bridge`), so the ViT's weights move there unchanged. Feature maps
come from the depths L/4, L/2, 3L/4 and L of the L layers, each after the encoder's last norm. With ``num_windows`` 1
they are the ViT's hidden states up to rounding. With more, all but a few layers attend within
``num_windows`` x ``num_windows`` windows of the image, which is faster on large images, as in the RF-DETR paper; the
features then differ from those of pre-training, and fine-tuning has to adapt them.

The position table is resampled once, bicubic, to a square of the longer side of the input; for an input that is not
square the backbone interpolates it in every forward.

The model stays stock: a saved folder loads without hf_dbp. It lacks what the published RF-DETR has from its
pre-training on Objects365: here decoder and heads start from random weights (`spread`).

Shapes: D width; T patches; L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    ViTModel,
)

from hf_dbp.config_limits import check_image_size
from hf_dbp.downstream.beit import sides
from hf_dbp.downstream.bridge import dinov2_fields, fill_dinov2
from hf_dbp.downstream.networks import load_stock
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_config
from hf_dbp.stock_vit_mae import resampled_positions

__all__ = ["STOCK_RATIO", "build_detector", "is_detector", "load_detector"]

CLASSES = {one.__name__: one for one in (RfDetrForObjectDetection, RfDetrForInstanceSegmentation)}
QUERIES = 300  # RF-DETR's
STOCK_RATIO = 16  # RF-DETR's cells of a mask per point, `mask_point_sample_ratio`
POINTS = 1024  # at least so many cells of a mask are compared
MASK_STRIDE = 4  # pixels per cell of a predicted mask, RF-DETR's


def build_detector(
    vit: ViTModel,
    names: Sequence[str],
    *,
    image_size: tuple[int, int],
    instances: bool = False,
    num_queries: int | None = None,
    query_groups: int = 13,
    decoder_layers: int = 3,
    decoder_width: int = 256,
    num_windows: int = 1,
) -> PreTrainedModel:
    """An RF-DETR with a new decoder and new heads over the ViT's weights (copied).

    Args:
        vit: stock ViT of any patch size and number of channels.
        names: class names; there is no background class.
        image_size: height and width of its input.
        instances: predict a mask with every box.
        num_queries: objects that can be found in an image; default: 300, or the number of patches if that is less.
        query_groups: copies of the queries in training (Group DETR).
        decoder_layers, decoder_width: of the decoder; the width is a multiple of 32.
        num_windows: windows per side that most layers attend within; 1 for none.

    Raises:
        UserError: patches or windows do not tile that size, there are more queries than patches, or the ViT cannot be a
            DINOv2.
    """
    patch = sides(vit.config.patch_size)[0]
    check_image_size(image_size, patch)
    height, width = (side // patch for side in image_size)
    queries = min(QUERIES, height * width) if num_queries is None else num_queries
    if not 0 < queries <= height * width:
        raise UserError(
            f"--num_queries {queries}: every query starts from a patch, and an image of {image_size[0]} x "
            f"{image_size[1]} pixels has {height * width}; lower it, or raise --image_size"
        )
    if decoder_width < 32 or decoder_width % 32:
        raise UserError(f"--decoder_width {decoder_width}: give a multiple of 32, such as 256")
    if num_windows > 1 and (height != width or height % num_windows):
        raise UserError(
            f"--num_windows {num_windows} does not tile the {height} x {width} patches of an image: windows are for "
            "square images whose side in patches is a multiple of it"
        )
    side, layers = max(height, width), vit.config.num_hidden_layers
    depths = sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3, 4)})
    fields = dinov2_fields(vit.config, "RF-DETR's backbone is one; take another encoder") | {"image_size": side * patch}
    config = RfDetrConfig(
        backbone_config=RfDetrDinov2Config(**fields, num_windows=num_windows, out_indices=depths),
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
        num_queries=queries,
        group_detr=query_groups,
        decoder_layers=decoder_layers,
        d_model=decoder_width,
        decoder_self_attention_heads=decoder_width // 32,
        decoder_cross_attention_heads=decoder_width // 16,
        decoder_ffn_dim=8 * decoder_width,
        mask_downsample_ratio=MASK_STRIDE,
        mask_point_sample_ratio=cells_per_point(image_size),
    )
    model: PreTrainedModel = (RfDetrForInstanceSegmentation if instances else RfDetrForObjectDetection)(config)
    spread(model)
    model.to(vit.dtype)
    state, table = vit.state_dict(), "embeddings.position_embeddings"
    rows, columns = (size // patch for size in sides(vit.config.image_size))
    state[table] = resampled_positions(state[table], (side, side), (rows, columns))
    fill_dinov2(backbone_of(model), state)
    return model


def cells_per_point(image_size: tuple[int, int]) -> int:
    """Cells of a mask per point at which the loss compares it with the truth: RF-DETR's 16, or fewer in small images.

    RF-DETR takes a sixteenth of a mask's cells for images of 312 to 768 pixels. In one of 128 pixels that is 64 points,
    of which a small object holds none, and its mask is never learned (docs/detect.md). At least `POINTS` are taken, or
    all cells if they are fewer.
    """
    cells = (image_size[0] // MASK_STRIDE) * (image_size[1] // MASK_STRIDE)
    return max(1, min(STOCK_RATIO, cells // POINTS))


def spread(model: PreTrainedModel) -> None:
    """Draw the matrices outside the encoder anew by Xavier's rule, as DETR does (Carion et al. 2020).

    transformers draws them with a standard deviation of 0.02, which suits weights that are loaded afterwards: from it
    a detector learns several times more slowly (docs/detect.md). Those that start at zero stay so. The heads over the
    encoder start as those over the decoder do, with rare objects and unmoved boxes, which transformers 5.17 omits.
    """
    detector = stock_detector(model)
    for classes, boxes in zip(detector.model.enc_out_class_embed, detector.model.enc_out_bbox_embed, strict=True):
        nn.init.zeros_(boxes.layers[-1].weight)
        classes.bias.data.copy_(detector.class_embed.bias.data)
    encoder = set(backbone_of(model).modules())
    for module in model.modules():
        if module not in encoder and isinstance(module, nn.Linear | nn.Conv2d) and bool(module.weight.any()):
            nn.init.xavier_uniform_(module.weight)


def stock_detector(model: PreTrainedModel) -> Any:
    """What finds the boxes: the model itself, or what it holds if it finds masks too."""
    return model.model if isinstance(model, RfDetrForInstanceSegmentation) else model


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder within an RF-DETR."""
    backbone: PreTrainedModel = stock_detector(model).model.backbone.backbone
    return backbone


def is_detector(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an RF-DETR with heads."""
    return any(name in CLASSES for name in config.get("architectures") or ())


def load_detector(source: str, **hub_options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a trained RF-DETR, ours or a public one, from a folder or the Hub, and the content of its config.json.

    Raises: UserError: it is not one; see `hf_dbp.hub.untrusted`.
    """
    content = read_config(source, **hub_options)
    architectures = [str(name) for name in content.get("architectures") or ()]
    known = next((name for name in architectures if name in CLASSES), None)
    if known is None:
        raise UserError(
            f"{source} holds {', '.join(architectures) or 'no architecture'}, not one of {', '.join(CLASSES)}"
        )
    return load_stock(CLASSES[known], source, content, "object detection", **hub_options), content
