"""Train a VideoMAE from scratch on image sequences or volumes, with or without decorrelation.

    python examples/masked_video.py --train_dir CAMVID/images --output_dir outputs/video --method dbp

--train_dir holds pictures whose names are SEQUENCE_FRAME.png, or stacks of slices: .npy (T, H, W) and NIfTI (.nii,
.nii.gz), whose slices are the frames. Lines that decorrelation adds are marked with (*). The saved model is a stock
VideoMAEForPreTraining.
"""

import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainingArguments, VideoMAEConfig, VideoMAEForPreTraining

from hf_dbp import DecorrelationArguments, DecorrelationCallback, decorrelate, fuse
from hf_dbp.records import RunRecord, arguments_record
from hf_dbp.training.optimizers import HiddenWithAdamW
from hf_dbp.training.recording import RecordingCallback

PICTURES = (".png", ".jpg", ".jpeg")


@dataclass
class ScriptArguments:
    train_dir: str = field(metadata={"help": "Folder of SEQUENCE_FRAME pictures, or of .npy, .nii and .nii.gz stacks."})
    method: str = field(default="bp", metadata={"choices": ["bp", "dbp"], "help": "Plain or decorrelated backprop."})
    optimizer: str = field(default="adamw", metadata={"choices": ["adamw", "muon"], "help": "Of the weights."})
    layers: str = field(default="all", metadata={"choices": ["auto", "all", "block_inputs"], "help": "Decorrelated."})
    image_size: int = field(default=64, metadata={"help": "Side of a frame that the model sees."})
    num_frames: int = field(default=8, metadata={"help": "Frames of a clip; two make a patch."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch."})
    hidden_size: int = field(default=128, metadata={"help": "Width; the decoder is half as wide."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of the encoder; the decoder has two."})
    mask_ratio: float = field(default=0.75, metadata={"help": "Share of the tubes to mask, the same in all frames."})


def read_stack(file: Path) -> np.ndarray:
    """A volume as frames (T, H, W), from 0 to 1."""
    if file.suffix == ".npy":
        stack = np.load(file).astype(np.float32)
    else:
        import nibabel

        stack = np.moveaxis(nibabel.load(file).get_fdata(dtype=np.float32), -1, 0)
    return (stack - stack.min()) / max(float(np.ptp(stack)), 1e-6)


def read_videos(folder: str, side: int) -> list[torch.Tensor]:
    """Sequences of frames (T, 3, side, side), in a fixed order; a volume's channel is repeated."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    videos = []
    for _, frames in groupby(pictures, key=lambda file: (file.parent, file.stem.rpartition("_")[0])):
        scaled = [np.asarray(Image.open(file).convert("RGB").resize((side, side))) for file in frames]
        videos.append(torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) / 255)
    for file in (file for file in files if file.suffix == ".npy" or ".nii" in file.suffixes):
        frames = torch.from_numpy(read_stack(file))[:, None]
        videos.append(torch.nn.functional.interpolate(frames, (side, side), mode="bilinear").expand(-1, 3, -1, -1))
    return videos


def clips(videos: list[torch.Tensor], length: int, first: float, last: float) -> list[torch.Tensor]:
    """Every clip of consecutive frames in this part of each sequence."""
    parts = (video[int(first * len(video)) : int(last * len(video))] for video in videos)
    return [part[i : i + length] for part in parts for i in range(len(part) - length + 1)]


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, DecorrelationArguments, TrainingArguments))
    script, decorrelation, args = parser.parse_args_into_dataclasses(arguments or sys.argv[1:])
    args.remove_unused_columns, args.label_names, args.prediction_loss_only = False, ["pixel_values"], True
    videos = read_videos(script.train_dir, script.image_size)
    train, validation = (clips(videos, script.num_frames, *part) for part in ((0.0, 0.8), (0.8, 1.0)))
    if not train or not validation:
        raise SystemExit(f"{script.train_dir}: too few frames for clips of {script.num_frames}")
    mean = torch.stack([clip.mean() for clip in train]).mean()
    std = torch.stack([(clip - mean).square().mean() for clip in train]).mean().sqrt()
    places = (script.image_size // script.patch_size) ** 2

    def collate(batch: list[torch.Tensor], seed: int | None = None) -> dict[str, torch.Tensor]:
        """Clips and the mask of a batch, the same in all frames; in validation the mask never changes."""
        fixed = seed is not None or not trainer.model.training
        generator = torch.Generator().manual_seed(seed or len(batch)) if fixed else None
        order = torch.rand(len(batch), places, generator=generator).argsort(1)
        tubes = (order < round(script.mask_ratio * places)).repeat(1, script.num_frames // 2)
        return {"pixel_values": (torch.stack(batch) - mean) / std, "bool_masked_pos": tubes}

    torch.manual_seed(args.seed)
    width, blocks, heads = script.hidden_size, script.num_layers, script.hidden_size // 32
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads, "norm_pix_loss": False}
    sizes |= {"decoder_hidden_size": width // 2, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "decoder_intermediate_size": 2 * width, "num_frames": script.num_frames}
    shape = {"image_size": script.image_size, "patch_size": script.patch_size}
    model = VideoMAEForPreTraining(VideoMAEConfig(**sizes, **shape))
    record = RunRecord("pretraining", script.method, script.optimizer, args.seed)
    record.arguments = arguments_record(script, decorrelation, args)
    record.data = {"source": script.train_dir, "train": len(train), "validation": len(validation)}
    callbacks = [RecordingCallback(record)]
    if script.method == "dbp":  # (*)
        decorrelate(model, script.layers, batch=collate(train[: args.per_device_train_batch_size], 0))
        callbacks.append(DecorrelationCallback(decorrelation, seed=args.seed))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    if script.optimizer == "muon":
        optimizer = HiddenWithAdamW(model, lr=args.learning_rate, weight_decay=args.weight_decay)
    data = {"train_dataset": train, "eval_dataset": validation, "data_collator": collate, "callbacks": callbacks}
    trainer = Trainer(model, args, optimizers=(optimizer, None), **data)
    trainer.train()
    (fuse(model) if script.method == "dbp" else model).save_pretrained(args.output_dir)  # (*)


if __name__ == "__main__":
    main()
