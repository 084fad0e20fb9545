"""Load a fused model from a checkpoint in one call; find the folder of a run that holds its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import ViTModel
from transformers.trainer_callback import TrainerState

from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import load_model
from hf_dbp.modeling_dbp_vit_mae import extract_vit
from hf_dbp.training.saving import checkpoint_step, whole_checkpoints

__all__ = ["load_fused_vit", "model_folder"]

CONFIG, STATE = "config.json", "trainer_state.json"


def model_folder(run: str | os.PathLike[str]) -> Path:
    """The folder that holds the model of a run.

    Args:
        run: output folder of a run, or one of its ``checkpoint-N`` folders.

    Returns:
        ``run`` itself if it holds a model; for an unfinished run, its best checkpoint (lowest validation loss, highest
        mean IoU), or its last one if none was evaluated. Incomplete checkpoints do not count.

    Raises:
        UserError: there is no model and no complete checkpoint.
    """
    run = Path(run)
    if (run / CONFIG).is_file():
        return run
    complete = whole_checkpoints(run)
    if not complete:
        raise UserError(f"{run} holds no model; give the output folder of a run or one of its checkpoint-N folders")
    last = complete[max(complete)]
    best = TrainerState.load_from_json(str(last / STATE)).best_model_checkpoint
    step = None if best is None else checkpoint_step(Path(best))
    return last if step is None else complete.get(step, last)


def load_fused_vit(name_or_path: str | os.PathLike[str], **kwargs: Any) -> ViTModel:
    """Load a stock `ViTModel` directly from a pre-training checkpoint, decorrelated or plain; folder or Hub id.

    Args:
        name_or_path: output folder of a run, even an unfinished one (see `model_folder`), one of its checkpoints, or a
            Hub id.
        kwargs: as for ``from_pretrained`` (``revision``, ``token``, ...); ``dtype`` is float32 unless given.

    Raises:
        UserError: there is no checkpoint with that name, it is damaged, incomplete or not a ViT-MAE
            (`hf_dbp.hub.untrusted`), or a fused weight is not finite (the message names the layer).
    """
    source = model_folder(name_or_path) if Path(name_or_path).is_dir() else name_or_path
    return extract_vit(load_model(source, "dbp_vit_mae", "vit_mae", **kwargs))
