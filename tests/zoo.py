"""Tiny models of transformers and peft with random weights, and a batch for each; `python tests/zoo.py` writes the
table of docs/any_model.md: what `decorrelate(model, "all", batch=...)` does to them."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "any_model.md"
BEGIN, END = "<!-- table: python tests/zoo.py -->", "<!-- end of table -->"

Batch = dict[str, Tensor]
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LENGTHS = (8, 5, 3)


def text() -> Batch:
    ids = torch.randint(2, 50, (len(LENGTHS), max(LENGTHS)))
    mask = torch.stack([(torch.arange(max(LENGTHS)) < length).long() for length in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def bert() -> tuple[nn.Module, Batch]:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **BODY)), text()


def gpt2() -> tuple[nn.Module, Batch]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            loss_type="ForCausalLM",
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    ), text()


def llama() -> tuple[nn.Module, Batch]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **BODY)), text()


def t5() -> tuple[nn.Module, Batch]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    batch = text()
    return T5ForConditionalGeneration(config), batch | {"labels": batch["labels"][:, :6].contiguous()}


def vit() -> tuple[nn.Module, Batch]:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=32, patch_size=8, **BODY)), images()


def dinov2() -> tuple[nn.Module, Batch]:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(image_size=32, patch_size=8, **BODY)), images()


def swin() -> tuple[nn.Module, Batch]:
    from transformers import SwinConfig, SwinModel

    return SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4)
    ), images()


def convnext() -> tuple[nn.Module, Batch]:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), images()


def wav2vec2() -> tuple[nn.Module, Batch]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    config = Wav2Vec2Config(layerdrop=0.0, mask_time_prob=0.0, **convolutions, **positions, **BODY)
    mask = torch.stack([(torch.arange(400) < length).long() for length in (400, 250)])
    return Wav2Vec2Model(config), {"input_values": torch.randn(2, 400) * mask, "attention_mask": mask}


def videomae() -> tuple[nn.Module, Batch]:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, decoder_intermediate_size=32, **decoder, **BODY)
    masked = torch.tensor([[True, False, True, True, False, True, False, True]]).expand(2, -1)
    return VideoMAEForPreTraining(config), {"pixel_values": torch.randn(2, 4, 3, 16, 16), "bool_masked_pos": masked}


def lora() -> tuple[nn.Module, Batch]:
    from peft import LoraConfig, get_peft_model

    model, batch = bert()
    config = LoraConfig(r=4, target_modules=["query", "value", "dense"], lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(model, config), batch


ZOO: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "BertForMaskedLM": bert,
    "GPT2LMHeadModel": gpt2,
    "LlamaForCausalLM": llama,
    "T5ForConditionalGeneration": t5,
    "ViTModel": vit,
    "Dinov2Model": dinov2,
    "SwinModel": swin,
    "ConvNextModel": convnext,
    "Wav2Vec2Model": wav2vec2,
    "VideoMAEForPreTraining": videomae,
    "BertForMaskedLM with LoRA (peft)": lora,
}


def output(model: nn.Module, batch: Batch) -> Tensor:
    found: Any = model(**batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def tokens(model: nn.Module, batch: Batch, x: Tensor) -> Tensor:
    """The rows of a layer's input (B, T, D) that are no padding, by what this file knows of the batch."""
    mask = batch.get("attention_mask")
    if mask is not None and "input_values" in batch:
        lengths = model._get_feat_extract_output_lengths(mask.sum(-1))
        frames = model._get_feat_extract_output_lengths(torch.tensor(mask.shape[1]))
        mask = torch.arange(int(frames)) < lengths[:, None]
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return x.flatten(0, -2)
    return x[mask.bool()]


def general(name: str) -> str:
    """A layer's name without the numbers of blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name)


def table() -> str:
    """One row for each input of each model: which layers share its R, or why they stay plain."""
    from hf_dbp.probing import probe

    lines = ["| model | layers (one R for all of a row) | block input | stays plain |", "| --- | --- | --- | --- |"]
    for title, make in ZOO.items():
        torch.manual_seed(0)
        seen = set()
        for one in probe(*make()):
            names = ", ".join(dict.fromkeys(map(general, one.names)))
            line = f"`{names}` | {'yes' if one.block_input else ''} | {one.plain}"
            if line not in seen:
                lines.append(f"| {'' if seen else title} | {line} |")
                seen.add(line)
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
